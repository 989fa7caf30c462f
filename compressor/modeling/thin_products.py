"""Products of a few rows with many tokens, in the orders in which a processor multiplies them best.

Letters: l latents (of all sequences), r rows, s tokens, w width.
"""

from __future__ import annotations

import torch
from torch import Tensor

FEW = 64  # rows
TOKENS = 1024  # of a sum


def dots(query: Tensor, latents: Tensor) -> Tensor:
    """Return the dot products [l, r, s] of [l, r, w] with [l, s, w]."""
    if _one_by_one(query, latents):
        return torch.stack([x @ own.mT for x, own in zip(query, latents, strict=True)])
    if not 1 < query.shape[1] <= FEW or query.device.type != "cpu":
        return torch.bmm(query, latents.mT)
    return torch.bmm(latents, query.mT).mT


def sums(weights: Tensor, latents: Tensor) -> Tensor:
    """Return the sums [l, r, w] of [l, s, w] with weights [l, r, s].

    In single precision many tokens of one latent are cut, so that every processor has some.
    """
    if _one_by_one(weights, latents):
        return torch.stack([x @ own for x, own in zip(weights, latents, strict=True)])
    alone = len(weights) == 1 and weights.device.type == "cpu"
    tokens = weights.shape[2]
    whole = tokens // TOKENS * TOKENS
    if not alone or whole <= TOKENS or weights.shape[1] > FEW or weights.dtype != torch.float32:
        return torch.bmm(weights, latents)
    cut = weights[0, :, :whole].unflatten(-1, (-1, TOKENS)).transpose(0, 1)
    found = torch.bmm(cut, latents[0, :whole].unflatten(0, (-1, TOKENS))).sum(0, keepdim=True)
    if whole == tokens:
        return found
    return torch.baddbmm(found, weights[:, :, whole:], latents[:, whole:])


def add_sums(total: Tensor, weights: Tensor, latents: Tensor) -> None:
    """Add :func:`sums` to a total [l, r, w]."""
    if len(weights) > 1:
        total.baddbmm_(weights, latents)
    else:
        total += sums(weights, latents)


def _one_by_one(rows: Tensor, latents: Tensor) -> bool:
    """Whether one product for each latent is faster than one for all.

    In half precision torch is slow at many matrices with room between them, as a cache has it.
    """
    half = latents.element_size() == 2 and latents.device.type == "cpu"
    return half and rows.shape[1] <= FEW and not latents.is_contiguous()
