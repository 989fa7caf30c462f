"""Which of a layer's heads or latents one rank of tensor parallelism holds."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Share:
    """What one rank holds of a layer's heads, or of its latents.

    Attributes:
        first: number of the first one.
        count: how many.
        whole: how many there are over all ranks.
    """

    first: int
    count: int
    whole: int

    @classmethod
    def of(cls, whole: int, rank: int, ranks: int) -> Share:
        """Return a rank's share; with more ranks than parts, neighbours hold the same part.

        Raises:
            ValueError: neither number divides the other.
        """
        if whole % ranks and ranks % whole:
            raise ValueError(f"{whole} latents or heads cannot be divided over {ranks} ranks")
        return cls(rank * whole // ranks, max(1, whole // ranks), whole)

    def rows(self, loaded: Tensor) -> Tensor:
        """Return this share of a tensor [whole * n, ...], a view [count * n, ...]."""
        each = loaded.shape[0] // self.whole
        return loaded.narrow(0, self.first * each, self.count * each)
