"""The levels of packed latents, some tokens after others, ready for a product.

Letters: l latents (of all sequences), s tokens, w width, p planes of c codes each
(:mod:`aligned_codes`). So few tokens are unpacked at a time that they stay in a processor's cache.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .aligned_codes import RUNS, Aligner, runs
from .quantizer import Packed, Quantizer

NUMBERS = {"cpu": 2**20, "cuda": 2**25}  # unpacked at a time
FEWEST = 128  # tokens, a multiple of every scheme's


def tokens_at_a_time(packed: Packed, width: int) -> int:
    """Return how many tokens of all latents are unpacked at a time."""
    latents = packed.codes.shape[:-2].numel()
    most = NUMBERS.get(packed.codes.device.type, NUMBERS["cpu"]) // (latents * width)
    return max(1, most // FEWEST) * FEWEST


class Levels:
    """Levels of a scheme with scales per token, in units of the scale and of the quantiser.

    Where a latent has several scales they are multiplied by these. Zero points are not taken off.

    Args:
        quantizer: of the latents.
        packed: all of them, [b, g, ...].
        width: numbers per latent.
        dtype: of the levels.

    Attributes:
        planes: p; 1 where a latent has several scales.
    """

    def __init__(
        self, quantizer: Quantizer, packed: Packed, width: int, dtype: torch.dtype
    ) -> None:
        self.quantizer, self.width = quantizer, width
        self.codes, self.scale = packed.codes.flatten(0, 1), packed.scale.flatten(0, 1)
        self.blocks, self.size = self.scale.shape[-1], tokens_at_a_time(packed, width)
        self._runs, self._planes = runs(quantizer.bits, width), len(RUNS[quantizer.bits])
        self.planes = self._planes if self.blocks == 1 else 1
        # Fresh memory for each piece would cost more than what is written there.
        latents, tokens, columns = self.codes.shape
        shape = (latents, min(tokens, self.size))
        self._align = Aligner(quantizer.bits, columns, shape[1], self.codes.device)
        self._aligned = self.codes.new_empty(self._planes, *shape, columns)
        columns = columns if self.blocks == 1 else width
        self._levels = self.codes.new_empty(self.planes, *shape, columns, dtype=dtype)

    def __iter__(self) -> Iterator[tuple[int, int, Tensor]]:
        """Yield the first token, one past the last, and levels that lie there until the next.

        They are [p, l, s, c] in the order of :meth:`arranged`.
        """
        tokens = self.codes.shape[1]
        for start in range(0, tokens, self.size):
            stop = min(start + self.size, tokens)
            levels = _first(self._levels, stop - start)
            codes = self._unpacked(start, stop)
            if self.blocks == 1:
                self.quantizer.read_aligned(codes, levels)
            else:
                for plane, columns, own in self._runs:
                    self.quantizer.read_aligned(codes[plane, ..., columns], levels[0, ..., own])
                scaled = levels.unflatten(-1, (self.blocks, -1))
                scaled *= self.scale[:, start:stop, :, None]
            yield start, stop, levels

    def _unpacked(self, start: int, stop: int) -> Tensor:
        """Return aligned codes of some tokens, [planes, l, s, bytes]."""
        packed = self.codes[:, start:stop]
        if self.quantizer.bits == 8:
            return packed.unsqueeze(0)
        out = _first(self._aligned, stop - start)
        self._align(packed, out)
        return out

    def arranged(self, x: Tensor) -> Tensor:
        """Return rows [l, r, w] as their products with levels need them, [p, l, r, c]."""
        if self.blocks > 1 or self.quantizer.bits == 8:
            return x.unsqueeze(0)
        out = x.new_zeros(self.planes, *x.shape[:-1], self.codes.shape[-1])
        for plane, columns, own in self._runs:
            out[plane, ..., columns] = x[..., own]
        return out

    def restored(self, x: Tensor) -> Tensor:
        """Return sums [p, l, r, c] of levels as sums of latents, [l, r, w]."""
        if self.blocks > 1 or self.quantizer.bits == 8:
            return x[0]
        out = x.new_empty(*x.shape[1:-1], self.width)
        for plane, columns, own in self._runs:
            out[..., own] = x[plane, ..., columns]
        return out


def _first(memory: Tensor, tokens: int) -> Tensor:
    """Return contiguous memory [p, l, tokens, n] out of [p, l, most, n]."""
    if tokens == memory.shape[2]:
        return memory
    shape = (*memory.shape[:2], tokens, memory.shape[3])
    return memory.view(-1)[: torch.Size(shape).numel()].view(shape)
