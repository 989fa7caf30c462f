"""What calibration measured: first and second moments per layer, in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """Mean and covariance of a variable of ``n`` dimensions, or of one for each head.

    Attributes:
        mean: [..., n], float64.
        covariance: [..., n, n], float64, divided by the number of tokens.
        count: tokens seen.
    """

    mean: Tensor
    covariance: Tensor
    count: int


@dataclass(frozen=True)
class LayerStatistics:
    """One layer's moments; what was not asked for is None.

    Attributes:
        values: of V, per key/value head: mean [G, d], covariance [G, d, d].
        outputs: of the attention output of all heads together: mean [H d], covariance [H d, H d].
    """

    values: Moments | None = None
    outputs: Moments | None = None


@dataclass(frozen=True)
class Statistics:
    """All layers' moments and how many tokens they come from."""

    layers: tuple[LayerStatistics, ...]
    tokens: int


class MomentSum:
    """Adds up moments batch by batch; keeps sums only, never an activation."""

    def __init__(self) -> None:
        self.count = 0
        self.total: Tensor | None = None
        self.products: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """Add a batch ``x`` [tokens, n] or [tokens, heads, n], in float64 for the products."""
        x = x.detach().to(torch.float64)
        stacked = x.transpose(0, -2)
        total, products = x.sum(0), stacked.mT @ stacked
        self.count += x.shape[0]
        if self.total is None or self.products is None:
            self.total, self.products = total, products
        else:
            self.total += total
            self.products += products

    def finite(self) -> bool:
        """Say whether every sum so far is a finite number."""
        return self.total is None or bool(torch.isfinite(self.total).all())

    def moments(self) -> Moments | None:
        """Return mean and covariance of all that was added, None if nothing was."""
        if self.total is None or self.products is None:
            return None
        mean = self.total / self.count
        covariance = self.products / self.count - mean.unsqueeze(-1) * mean.unsqueeze(-2)
        return Moments(mean, (covariance + covariance.mT) / 2, self.count)
