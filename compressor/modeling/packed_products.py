"""The two products of attention with packed latents: scores of queries, and weighted sums.

Letters: b batch, g latents, r rows (queries of the heads that share a latent), s tokens in blocks S
of T, w width in blocks B of D. With few rows the scale and the zero point of a block are taken out
of the products: ``q . (scale * (level - zero)) = scale * (q . level - zero * sum(q))``, so that no
number of the cache is touched beyond its codes. With many rows it is cheaper to dequantise first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .packing import unpack
from .quantizer import Packed, Quantizer


def scores(quantizer: Quantizer, packed: Packed, query: Tensor) -> Tensor:
    """Return the dot products [b, g, r, s] of queries [b, g, r, w] with packed latents."""
    width = query.shape[-1]
    if not _folds(quantizer, query.shape[2], width):
        return query @ quantizer.dequantize(packed, width).to(query.dtype).mT
    if quantizer.scheme.token_block > 1:
        return _scores_by_channel(quantizer, packed, query)
    return _scores_by_token(quantizer, packed, query)


def weighted_sum(quantizer: Quantizer, packed: Packed, weights: Tensor, width: int) -> Tensor:
    """Return the sums [b, g, r, w] of packed latents with weights [b, g, r, s]."""
    if not _folds(quantizer, weights.shape[2], width):
        return weights @ quantizer.dequantize(packed, width).to(weights.dtype)
    if quantizer.scheme.token_block > 1:
        return _sum_by_channel(quantizer, packed, weights, width)
    return _sum_by_token(quantizer, packed, weights, width)


def _folds(quantizer: Quantizer, rows: int, width: int) -> bool:
    """Whether the scales are fewer than the numbers that they would be multiplied into."""
    scheme = quantizer.scheme
    blocks = scheme.blocks(width)
    if scheme.token_block > 1:
        return rows < scheme.token_block
    return rows * blocks < width


def _levels(quantizer: Quantizer, packed: Packed, width: int, dtype: torch.dtype) -> Tensor:
    """Return the levels [b, g, s, w] without scale and zero point."""
    return quantizer.levels(unpack(packed.codes, quantizer.bits, width, dtype))


def _factors(
    quantizer: Quantizer, packed: Packed, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Return scales and scaled zero points, both [b, g, B, S]."""
    scale = packed.scale.mT.to(dtype)
    if packed.zero is None:
        return scale, None
    return scale, quantizer.zero_levels(packed.zero).mT.to(dtype) * scale


def _scores_by_token(quantizer: Quantizer, packed: Packed, query: Tensor) -> Tensor:
    width, dtype = query.shape[-1], query.dtype
    levels = _levels(quantizer, packed, width, dtype)
    scale, zero = _factors(quantizer, packed, dtype)
    size = width // scale.shape[2]
    total: Tensor | None = None
    for block, (q, x) in enumerate(
        zip(query.split(size, dim=-1), levels.split(size, dim=-1), strict=True)
    ):
        part = (q @ x.mT).mul_(scale[:, :, block : block + 1])
        total = part if total is None else total.add_(part)
    if total is None:
        raise ValueError("a latent has no dimensions")
    if zero is not None:
        total = total.sub_(query.unflatten(-1, (-1, size)).sum(-1) @ zero)
    return total


def _sum_by_token(quantizer: Quantizer, packed: Packed, weights: Tensor, width: int) -> Tensor:
    dtype = weights.dtype
    levels = _levels(quantizer, packed, width, dtype)
    scale, zero = _factors(quantizer, packed, dtype)
    size = width // scale.shape[2]
    sums = torch.cat(
        [
            (weights * scale[:, :, block : block + 1]) @ x
            for block, x in enumerate(levels.split(size, dim=-1))
        ],
        dim=-1,
    )
    if zero is not None:
        taken = (weights @ zero.mT).unsqueeze(-1)
        sums = (sums.unflatten(-1, (-1, size)) - taken).flatten(-2)
    return sums


def _scores_by_channel(quantizer: Quantizer, packed: Packed, query: Tensor) -> Tensor:
    dtype, block = query.dtype, quantizer.scheme.token_block
    levels = _levels(quantizer, packed, query.shape[-1], dtype).unflatten(2, (-1, block))
    scaled = query.unsqueeze(2) * packed.scale.to(dtype).unsqueeze(3)  # [b, g, S, r, w]
    found = scaled @ levels.mT
    if packed.zero is not None:
        zero = quantizer.zero_levels(packed.zero).to(dtype)
        found = found - scaled @ zero.unsqueeze(-1)
    return found.transpose(2, 3).flatten(3)


def _sum_by_channel(quantizer: Quantizer, packed: Packed, weights: Tensor, width: int) -> Tensor:
    dtype, block = weights.dtype, quantizer.scheme.token_block
    levels = _levels(quantizer, packed, width, dtype).unflatten(2, (-1, block))
    grouped = weights.unflatten(3, (-1, block)).transpose(2, 3)  # [b, g, S, r, T]
    found = grouped @ levels
    if packed.zero is not None:
        zero = quantizer.zero_levels(packed.zero).to(dtype)
        found = found - grouped.sum(-1, keepdim=True) * zero.unsqueeze(3)
    return (found * packed.scale.to(dtype).unsqueeze(3)).sum(2)
