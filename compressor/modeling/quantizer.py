"""What all quantisers share: packed tensors, blocks, and the gradient that passes straight through.

Shapes: s tokens, w width of a latent, S blocks of tokens, T tokens in each, B blocks of dimensions,
D dimensions in each. Rounding is done in float32, whatever comes in.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .packing import pack, unpack
from .schemes import Scheme, zero_unit

SMALLEST, LARGEST = 2.0**-24, 65504.0  # scales are fp16


class Packed(NamedTuple):
    """Latents in few bits.

    Attributes:
        codes: [..., s, bytes], uint8, as :mod:`packing` lays them out.
        scale: [..., S, B], fp16.
        zero: [..., S, B], uint8, or None where a scheme has no zero points.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None

    def map(self, change: Callable[[Tensor], Tensor]) -> Packed:
        """Return what ``change`` makes of each tensor."""
        zero = None if self.zero is None else change(self.zero)
        return Packed(change(self.codes), change(self.scale), zero)

    def tokens(self, start: int, stop: int, token_block: int) -> Packed:
        """Return views of the tokens from ``start`` to ``stop``, whole blocks of them."""
        blocks = slice(start // token_block, stop // token_block)
        zero = None if self.zero is None else self.zero[..., blocks, :]
        return Packed(self.codes[..., start:stop, :], self.scale[..., blocks, :], zero)


def in_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return numbers that were read back in the model's dtype.

    The largest fp16 number may be read back as one beyond them, which is taken for it.
    """
    return (x.clamp(-LARGEST, LARGEST) if dtype == torch.float16 else x).to(dtype)


class Quantizer(ABC):
    """Rounds latents of one width to a number of bits, and back.

    Args:
        scheme: which numbers share a scale, and what is stored of it.
        bits: of a number.
    """

    def __init__(self, scheme: Scheme, bits: int) -> None:
        self.scheme, self.bits, self.top = scheme, bits, 2**bits - 1

    def bytes(self, tokens: int, width: int, dtype: torch.dtype = torch.bfloat16) -> int:
        """Return the exact bytes of one latent of so many tokens.

        Args:
            tokens: of the sequence; those that do not fill a block stay as they are.
            width: numbers per latent.
            dtype: of numbers that are not packed.
        """
        return self.scheme.stored_bytes(tokens, width, self.bits, number_bytes=dtype.itemsize)

    def quantize(self, x: Tensor) -> Packed:
        """Pack latents [..., s, w], whole blocks of tokens."""
        codes, scale, zero = self._rounded(self._blocks(x.detach().float()))
        return Packed(pack(self._joined(codes), self.bits), scale, zero)

    def dequantize(self, packed: Packed, width: int) -> Tensor:
        """Return the latents [..., s, w] that are packed, in float32."""
        codes = unpack(packed.codes, self.bits, width, torch.float32)
        return self._joined(self._read(self._blocks(codes), packed.scale, packed.zero))

    def read_back(self, x: Tensor) -> Tensor:
        """Return what packing and unpacking makes of latents [..., s, w], in their dtype."""
        codes, scale, zero = self._rounded(self._blocks(x.detach().float()))
        return in_dtype(self._joined(self._read(codes.float(), scale, zero)), x.dtype)

    def straight_through(self, x: Tensor) -> Tensor:
        """Return :meth:`read_back`, whose gradient is passed on to ``x`` as it is."""
        through: Tensor = _StraightThrough.apply(x, self)
        return through

    @abstractmethod
    def _rounded(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return codes [..., S, T, B, D], scales and zero points [..., S, B] of blocks."""

    @abstractmethod
    def levels(self, codes: Tensor) -> Tensor:
        """Return what codes of any shape stand for in units of the scale, zero points aside.

        ``codes`` are floating point numbers and may be overwritten.
        """

    @property
    @abstractmethod
    def aligned_unit(self) -> float:
        """What :meth:`read_aligned` counts in, in units of the scale."""

    @abstractmethod
    def read_aligned(self, codes: Tensor, out: Tensor) -> None:
        """Write what codes in the upper bits of bytes stand for, zero points aside.

        Args:
            codes: uint8, ``code * 2**(8 - bits)`` each, any shape.
            out: of the same shape, floating point. A zero point counts as it is stored.
        """

    def zero_levels(self, zero: Tensor) -> Tensor:
        """Return zero points in units of the scale, float32: what is taken from :meth:`levels`."""
        return zero.float() * zero_unit(self.bits)

    def _read(self, codes: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        levels = self.levels(codes)
        if zero is not None:
            levels = levels - self.zero_levels(zero)[..., :, None, :, None]
        return levels * scale.float()[..., :, None, :, None]

    def _blocks(self, x: Tensor) -> Tensor:
        """[..., s, w] -> [..., S, T, B, D]."""
        x = x.unflatten(-1, (self.scheme.blocks(x.shape[-1]), -1))
        return x.unflatten(-3, (-1, self.scheme.token_block))

    def _joined(self, x: Tensor) -> Tensor:
        """[..., S, T, B, D] -> [..., s, w]."""
        return x.flatten(-2).flatten(-3, -2)


class _StraightThrough(torch.autograd.Function):
    """Rounding forwards, nothing backwards."""

    @staticmethod
    def forward(_ctx: Any, x: Tensor, quantizer: Quantizer) -> Tensor:
        return quantizer.read_back(x)

    @staticmethod
    def backward(_ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None
