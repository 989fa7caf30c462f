"""Products of a few rows with many tokens, in the orders in which a processor multiplies them best.

Letters: l latents (of all sequences), r rows, s tokens, w width.
"""

from __future__ import annotations

import torch
from torch import Tensor

TOKENS = 1024  # of a sum


def dots(query: Tensor, latents: Tensor) -> Tensor:
    """Return the dot products [l, r, s] of [l, r, w] with [l, s, w]."""
    if query.shape[1] == 1 or query.device.type != "cpu":
        return torch.bmm(query, latents.mT)
    return torch.bmm(latents, query.mT).mT


def sums(weights: Tensor, latents: Tensor) -> Tensor:
    """Return the sums [l, r, w] of [l, s, w] with weights [l, r, s].

    Many tokens of one latent are cut, so that every processor has some.
    """
    tokens = weights.shape[2]
    whole = tokens // TOKENS * TOKENS
    if whole <= TOKENS or len(weights) > 1 or weights.device.type != "cpu":
        return torch.bmm(weights, latents)
    cut = weights[0, :, :whole].unflatten(-1, (-1, TOKENS)).transpose(0, 1)
    found = torch.bmm(cut, latents[0, :whole].unflatten(0, (-1, TOKENS))).sum(0, keepdim=True)
    if whole < tokens:
        found.baddbmm_(weights[:, :, whole:], latents[:, whole:])
    return found


def add_sums(total: Tensor, weights: Tensor, latents: Tensor) -> None:
    """Add :func:`sums` to a total [l, r, w]."""
    if len(weights) > 1:
        total.baddbmm_(weights, latents)
    else:
        total += sums(weights, latents)
