"""Asymmetric rounding to the nearest of equally spaced levels, with a scale and a zero point.

Two schemes round like this: ``per_token``, where blocks of a token's dimensions share a scale, and
``per_channel``, where one dimension of 32 tokens does (KIVI, arXiv 2402.02750, for keys).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .quantizer import LARGEST, SMALLEST, Quantizer
from .schemes import zero_unit

# The range is shrunk by what is best for 64 normal numbers in the mean square.
SHRINK = {8: 1.0, 4: 0.96, 3: 0.86, 2: 0.66}


def range_scale(bits: int) -> float:
    """Return by what the range of numbers becomes their scale."""
    return SHRINK[bits] / (2**bits - 1)


class AffineQuantizer(Quantizer):
    """``x = scale * (code - zero * 2**bits / 256)``; zero is always inside the range."""

    def _rounded(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        low = x.amin((-3, -1), keepdim=True).clamp_max(0)
        high = x.amax((-3, -1), keepdim=True).clamp_min(0)
        scale = (high - low) * range_scale(self.bits)
        scale = scale.clamp(SMALLEST, LARGEST).half()
        step = scale.float()
        unit = zero_unit(self.bits)
        zero = ((self.top - (low + high) / step) / 2 / unit).round().clamp(0, self.top / unit)
        codes = (x / step + zero * unit).round().clamp(0, self.top)
        stored = (scale[..., 0, :, 0], zero[..., 0, :, 0].to(torch.uint8))
        return codes.to(torch.uint8), *stored

    def levels(self, codes: Tensor) -> Tensor:
        """Return the codes themselves."""
        return codes

    @property
    def aligned_unit(self) -> float:
        """Aligned codes count in the unit of zero points."""
        return zero_unit(self.bits)

    def read_aligned(self, codes: Tensor, out: Tensor) -> None:
        """Write the codes themselves."""
        out.copy_(codes)
