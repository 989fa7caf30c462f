"""Levels for normal numbers without a zero point: what rotated latents without a mean are.

The levels are those of Lloyd and Max for the standard normal distribution, up to a cubic through
them: ``level(u) = u * (a + b * u**2)``, u the code less half of the largest one. That costs 2% of
the mean square error at 4 bits, 0.3% at 3 bits and nothing at 2 bits, and reads back without a
table. The scale is the one that is best for the codes in the least squares sense, twice refined.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .quantizer import LARGEST, SMALLEST, Quantizer

CUBICS = {
    4: (0.23516735, 0.00218028),
    3: (0.47025022, 0.01170080),
    2: (0.89288682, 0.05069264),
}
REFINEMENTS = 2


class NormalQuantizer(Quantizer):
    """``x = scale * u * (a + b * u**2)``."""

    def _rounded(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        over = (-3, -1)
        scale = x.double().square().mean(over, keepdim=True).sqrt()
        for _ in range(REFINEMENTS):
            levels = self.levels(self._codes(x, _stored(scale)).float()).double()
            scale = (levels * x).sum(over, keepdim=True) / levels.square().sum(over, keepdim=True)
        kept = _stored(scale)
        return self._codes(x, kept), kept[..., 0, :, 0], None

    def _codes(self, x: Tensor, scale: Tensor) -> Tensor:
        _, between = self.levels_and_limits(x.device)
        ratio = (x / scale.float()).contiguous()
        return torch.bucketize(ratio, between).to(torch.uint8)

    def levels_and_limits(self, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """Return the levels of all codes, float32, and what lies halfway between two of them."""
        levels = self.levels(torch.arange(self.top + 1, dtype=torch.float32, device=device))
        return levels, (levels[1:] + levels[:-1]) / 2

    def levels(self, codes: Tensor) -> Tensor:
        """Return the levels of codes; exact to rounding in any floating point dtype."""
        a, b = CUBICS[self.bits]
        u = codes.sub_(self.top / 2)
        return u.mul_(u.square().mul_(b).add_(a))

    @property
    def aligned_unit(self) -> float:
        """Aligned codes less half of the largest one, as they are written before they are bent."""
        return CUBICS[self.bits][0] * 2.0**self.bits / 256

    def read_aligned(self, codes: Tensor, out: Tensor) -> None:
        """Write ``u * (1 + b / a * u**2)``, u in the unit of aligned codes: signed bytes."""
        a, b = CUBICS[self.bits]
        one = 256 // 2**self.bits  # between two codes
        out.copy_((codes - self.top * one // 2).view(torch.int8))
        out.addcmul_(out, out * out, value=b / (a * one**2))


def _stored(scale: Tensor) -> Tensor:
    return scale.clamp(SMALLEST, LARGEST).half()
