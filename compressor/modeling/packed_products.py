"""The two products of attention with packed latents: scores of queries, and weighted sums.

Letters: b batch, g latents, r rows (queries of the heads that share a latent), s tokens in groups S
of T, w width in blocks B of D. A few tokens are unpacked at a time, so that they stay in a
processor's cache. With few rows the scale and the zero point of a block are taken out of the
products: ``q . (scale * (level - zero)) = scale * (q . level - zero * sum(q))``, so that no number
is touched beyond its codes. With several blocks only the zero point is, and with many rows it is
cheaper to dequantise first.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .packed_levels import Levels, tokens_at_a_time
from .packing import unpack
from .quantizer import Packed, Quantizer
from .thin_products import add_sums, dots, sums


def scores(quantizer: Quantizer, packed: Packed, query: Tensor) -> Tensor:
    """Return the dot products [b, g, r, s] of queries [b, g, r, w] with packed latents."""
    width = query.shape[-1]
    if not _folds(quantizer, query.shape[2], width):
        return torch.cat(
            [
                query @ quantizer.dequantize(some, width).to(query.dtype).mT
                for _, some in _pieces(quantizer, packed, width)
            ],
            dim=-1,
        )
    if quantizer.scheme.token_block > 1:
        found = _pieces(quantizer, packed, width)
        return torch.cat([_scores_by_channel(quantizer, x, query) for _, x in found], dim=-1)
    return _scores_by_token(quantizer, packed, query)


def weighted_sum(quantizer: Quantizer, packed: Packed, weights: Tensor, width: int) -> Tensor:
    """Return the sums [b, g, r, w] of packed latents with weights [b, g, r, s]."""
    if _folds(quantizer, weights.shape[2], width) and quantizer.scheme.token_block == 1:
        return _sum_by_token(quantizer, packed, weights, width)
    total = weights.new_zeros(*weights.shape[:3], width)
    folds = _folds(quantizer, weights.shape[2], width)
    for tokens, some in _pieces(quantizer, packed, width):
        own = weights[..., tokens]
        if folds:
            total += _sum_by_channel(quantizer, some, own, width)
        else:
            total += own @ quantizer.dequantize(some, width).to(weights.dtype)
    return total


def _pieces(quantizer: Quantizer, packed: Packed, width: int) -> Iterator[tuple[slice, Packed]]:
    """Yield some tokens at a time: which they are, and what is packed of them."""
    tokens, size = packed.codes.shape[2], tokens_at_a_time(packed, width)
    for start in range(0, tokens, size):
        stop = min(start + size, tokens)
        yield slice(start, stop), packed.tokens(start, stop, quantizer.scheme.token_block)


def _folds(quantizer: Quantizer, rows: int, width: int) -> bool:
    """Whether the scales are fewer than the numbers that they would be multiplied into."""
    scheme = quantizer.scheme
    if scheme.token_block > 1:
        return rows < scheme.token_block
    return rows * scheme.blocks(width) < width


def _levels(quantizer: Quantizer, packed: Packed, width: int, dtype: torch.dtype) -> Tensor:
    """Return the levels [b, g, s, w] without scale and zero point."""
    return quantizer.levels(unpack(packed.codes, quantizer.bits, width, dtype))


def _scores_by_token(quantizer: Quantizer, packed: Packed, query: Tensor) -> Tensor:
    shape, query = query.shape[:-1], query.flatten(0, 1) * quantizer.aligned_unit
    levels = Levels(quantizer, packed, query.shape[-1], query.dtype)
    arranged = levels.arranged(query).flatten(0, 1)
    total = query.new_empty(*query.shape[:2], packed.codes.shape[2])
    for start, stop, some in levels:
        found = dots(arranged, some.flatten(0, 1))
        if levels.planes > 1:
            found = found.unflatten(0, (levels.planes, -1)).sum(0)
        total[..., start:stop] = found
    scale, zero = _factors(packed, query.dtype)
    if levels.blocks == 1:
        if zero is not None:
            total.addcmul_(query.sum(-1, keepdim=True), zero, value=-1)
        total *= scale
    elif zero is not None:
        total -= query.unflatten(-1, (levels.blocks, -1)).sum(-1) @ zero.mul_(scale)
    return total.view(*shape, -1)


def _sum_by_token(quantizer: Quantizer, packed: Packed, weights: Tensor, width: int) -> Tensor:
    shape, weights = weights.shape[:-1], weights.flatten(0, 1)
    levels = Levels(quantizer, packed, width, weights.dtype)
    scale, zero = _factors(packed, weights.dtype)
    if levels.blocks == 1:
        weights = weights * scale
    elif zero is not None:
        zero *= scale
    total: list[Tensor] = []
    for start, stop, some in levels:
        own = weights[..., start:stop]
        if total:
            for plane, so_far in zip(some, total, strict=True):
                add_sums(so_far, own, plane)
        else:
            total = [sums(own, plane) for plane in some]
    found = levels.restored(torch.stack(total))
    if zero is not None:
        alone = weights.shape[1] == zero.shape[1] == 1
        taken = (weights * zero).sum(-1, keepdim=True) if alone else weights @ zero.mT
        found = (found.unflatten(-1, (levels.blocks, -1)) - taken.unsqueeze(-1)).flatten(-2)
    return (found * quantizer.aligned_unit).view(*shape, width)


def _factors(packed: Packed, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Return scales and zero points, both [b * g, B, S]."""
    scale = packed.scale.flatten(0, 1).to(dtype).mT
    return scale, None if packed.zero is None else packed.zero.flatten(0, 1).to(dtype).mT


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
