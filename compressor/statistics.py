"""What calibration measured: first and second moments per layer, in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vdcompress.errors import UsageError


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

    @property
    def second(self) -> Tensor:
        """E[x x^T], [..., n, n]."""
        return self.covariance + self.mean.unsqueeze(-1) * self.mean.unsqueeze(-2)

    def blocks(self, count: int) -> Moments:
        """Cut joint moments [n] into those of ``count`` runs, [count, n / count]."""
        mean = self.mean.unflatten(0, (count, -1))
        pairs = self.covariance.unflatten(0, (count, -1)).unflatten(2, (count, -1))
        within = torch.diagonal(pairs, dim1=0, dim2=2).permute(2, 0, 1)
        return Moments(mean, within, self.count)


@dataclass(frozen=True)
class QuerySample:
    """Some tokens' queries and what the loss wants of them, for fits that moments cannot carry.

    Attributes:
        queries: [H, tokens, d], as attention sees them.
        pulls: gradient of the loss by the queries, [H, tokens, d]: keys averaged by how much the
            loss moves with each score.

    Both are bfloat16: there are many of them.
    """

    queries: Tensor
    pulls: Tensor


@dataclass(frozen=True)
class LayerStatistics:
    """One layer's moments; what was not asked for is None.

    Keys and queries are those that attention sees, behind RoPE. Gradients are of the loss of each
    window, summed over its tokens, against labels drawn from the model itself: their second
    moments are Fisher information.

    Attributes:
        values: of V, joint: mean [G d], covariance [G d, G d].
        keys: of K, joint, likewise.
        queries: per query head: mean [H, d], covariance [H, d, d].
        outputs: of the attention output of all heads together: mean [H d], covariance [H d, H d].
        value_gradients: by V, joint.
        key_gradients: by K, joint.
        output_gradients: by the attention output, per query head.
        query_pulls: a sample of tokens, not moments.
    """

    values: Moments | None = None
    keys: Moments | None = None
    queries: Moments | None = None
    outputs: Moments | None = None
    value_gradients: Moments | None = None
    key_gradients: Moments | None = None
    output_gradients: Moments | None = None
    query_pulls: QuerySample | None = None

    def require(self, name: str) -> Moments:
        """Return moments by name.

        Raises:
            UsageError: they were not measured.
        """
        found = getattr(self, name)
        if found is None:
            raise UsageError(
                f"the statistics hold no {name}", f"calibrate(..., needs={{{name!r}}})"
            )
        assert isinstance(found, Moments)
        return found


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
