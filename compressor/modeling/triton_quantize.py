"""Packing latents on CUDA by one kernel, what :class:`Quantizer` does in some thirty.

A step of decoding writes a few latents into every part of every layer, so that launches, not bytes,
are what it costs. Shapes: b sequences, g latents, s tokens, w width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from .decode_tiles import power_of_two
from .quantize_kernels import quantize
from .quantizer import LARGEST, SMALLEST, Packed, Quantizer
from .quantizer_affine import range_scale
from .quantizer_normal import REFINEMENTS, NormalQuantizer
from .schemes import NORMAL, SCHEMES, codes_per_word, word_bytes, zero_unit

NUMBERS = 512  # of a program, where there are many latents and one is not larger
FEW_LATENTS = 4096  # each of which has a program of its own


@dataclass(frozen=True)
class Form:
    """What the kernel writes.

    Attributes:
        scheme: name of it.
        bits: of a code.
        width: numbers per latent.
        rows: latents of a program.
        levels: that codes stand for, of normal numbers.
        limits: between these.
    """

    scheme: str
    bits: int
    width: int
    rows: int = 1
    levels: tuple[float, ...] = ()
    limits: tuple[float, ...] = ()
    smallest: float = SMALLEST
    largest: float = LARGEST
    refinements: int = REFINEMENTS

    @property
    def normal(self) -> bool:
        """Whether codes stand for the levels of normal numbers."""
        return self.scheme == NORMAL.name

    @property
    def top(self) -> int:
        """The largest code."""
        return 2**self.bits - 1

    @property
    def shrink(self) -> float:
        """By what the range of numbers becomes a scale."""
        return range_scale(self.bits)

    @property
    def zero_unit(self) -> float:
        """What a zero point's byte counts, in codes."""
        return zero_unit(self.bits)

    @property
    def zero_top(self) -> float:
        """The largest zero point."""
        return self.top / self.zero_unit

    @property
    def blocks(self) -> int:
        """Scales of a latent."""
        return SCHEMES[self.scheme].blocks(self.width)

    @property
    def dims(self) -> int:
        """Dimensions that share a scale."""
        return self.width // self.blocks

    @property
    def runs(self) -> int:
        """Runs of a latent's codes, see :mod:`packing`."""
        return codes_per_word(self.bits)

    @property
    def bytes(self) -> int:
        """Bytes that hold a code of each run."""
        return word_bytes(self.bits)

    @property
    def columns(self) -> int:
        """Codes of a run."""
        return -(-self.width // self.runs)

    @property
    def room(self) -> int:
        """The least power of two that holds a run."""
        return power_of_two(self.columns)


@cache
def form_of(scheme: str, bits: int, width: int, *, few: bool) -> Form:
    """Return what is written of latents of a width, of which there are few."""
    form = Form(scheme, bits, width)
    if not few:
        form = replace(form, rows=max(1, NUMBERS // (form.runs * form.room)))
    if not form.normal:
        return form
    levels, limits = NormalQuantizer(NORMAL, bits).levels_and_limits()
    return replace(form, levels=tuple(levels.tolist()), limits=tuple(limits.tolist()))


def quantize_into(
    quantizer: Quantizer, x: Tensor, into: Packed, places: Tensor | None = None
) -> None:
    """Write the same bits as ``quantizer.quantize(x)`` yields.

    Args:
        quantizer: with scales per token.
        x: [b, g, s, w].
        into: views of rooms; the tokens of a latent lie behind each other.
        places: int64 [2], by how many tokens what is read and what is written lies behind the first
            of ``x`` and of ``into``.
    """
    b, g, tokens, width = x.shape
    if not x.numel():
        return
    x = x.detach()
    x = x if x.stride(-1) == 1 else x.contiguous()
    latents = b * g * tokens
    few = latents <= FEW_LATENTS
    form = form_of(quantizer.scheme.name, quantizer.bits, width, few=few)
    codes, scale, zero = into
    with torch.cuda.device_of(x):
        quantize[(-(-latents // form.rows),)](
            x,
            *x.stride()[:3],
            codes,
            *codes.stride()[:2],
            scale,
            scale if zero is None else zero,
            *scale.stride()[:2],
            latents,
            g,
            tokens,
            x if places is None else places,
            FORM=form,
            PLACED=places is not None,
            num_warps=1,
        )
