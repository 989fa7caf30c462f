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

from .packing import unpack, unpack_runs
from .quantizer import Packed, Quantizer
from .schemes import codes_per_word

NUMBERS = {"cpu": 2**20, "cuda": 2**25}  # unpacked at a time
NARROWEST = 16  # run of codes that is multiplied by itself
FEWEST = 128  # tokens, a multiple of every scheme's


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
        pieces = _pieces(quantizer, packed, width)
        return torch.cat([_scores_by_channel(quantizer, x, query) for _, x in pieces], dim=-1)
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
    b, g, s, _ = packed.codes.shape
    most = NUMBERS.get(packed.codes.device.type, NUMBERS["cpu"]) // (b * g * width)
    size = max(1, most // FEWEST) * FEWEST
    for start in range(0, s, size):
        stop = min(start + size, s)
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


def _columns(
    quantizer: Quantizer, packed: Packed, width: int, scratch: Tensor
) -> Iterator[tuple[Tensor, slice]]:
    """Yield levels of some dimensions at a time, and which these are.

    They lie in ``scratch``, until the next ones. A run of codes that is wide enough is not put
    beside the others first. Where a latent has several scales the levels are multiplied by them.
    """
    bits, blocks = quantizer.bits, packed.scale.shape[-1]
    if blocks == 1 and width * bits % 8 == 0 and width // codes_per_word(bits) >= NARROWEST:
        runs = unpack_runs(packed.codes, bits, width)
    else:
        runs = [unpack(packed.codes, bits, width)]
    first = 0
    for run in runs:
        levels = quantizer.levels(scratch[: run.numel()].view(run.shape).copy_(run))
        if blocks > 1:
            levels.unflatten(-1, (blocks, -1)).mul_(packed.scale.unsqueeze(-1))
        yield levels, slice(first, first + run.shape[-1])
        first += run.shape[-1]


def _scratch(quantizer: Quantizer, packed: Packed, width: int, dtype: torch.dtype) -> Tensor:
    """Return memory for the levels of a piece: fresh memory for each would cost more than they."""
    _, first = next(_pieces(quantizer, packed, width))
    numbers = first.codes.shape[:3].numel() * width
    return torch.empty(numbers, dtype=dtype, device=packed.codes.device)


def _factors(
    quantizer: Quantizer, packed: Packed, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Return scales and scaled zero points, both [b, g, B, S]."""
    scale = packed.scale.to(dtype)
    if packed.zero is None:
        return scale.mT, None
    return scale.mT, (quantizer.zero_levels(packed.zero).to(dtype) * scale).mT


def _scores_by_token(quantizer: Quantizer, packed: Packed, query: Tensor) -> Tensor:
    width, dtype = query.shape[-1], query.dtype
    scale, zero = _factors(quantizer, packed, dtype)
    blocks = scale.shape[2]
    total = query.new_zeros(*query.shape[:3], packed.codes.shape[2])
    scratch = _scratch(quantizer, packed, width, dtype)
    for tokens, some in _pieces(quantizer, packed, width):
        for x, own in _columns(quantizer, some, width, scratch):
            total[..., tokens] += query[..., own] @ x.mT
    if blocks == 1:
        total *= scale
    if zero is not None:
        total -= query.unflatten(-1, (blocks, -1)).sum(-1) @ zero
    return total


def _sum_by_token(quantizer: Quantizer, packed: Packed, weights: Tensor, width: int) -> Tensor:
    dtype = weights.dtype
    scale, zero = _factors(quantizer, packed, dtype)
    blocks = scale.shape[2]
    scaled = weights * scale if blocks == 1 else weights
    sums = weights.new_zeros(*weights.shape[:3], width)
    scratch = _scratch(quantizer, packed, width, dtype)
    for tokens, some in _pieces(quantizer, packed, width):
        for x, own in _columns(quantizer, some, width, scratch):
            sums[..., own] += scaled[..., tokens] @ x
    if zero is not None:
        taken = (weights @ zero.mT).unsqueeze(-1)
        sums = (sums.unflatten(-1, (blocks, -1)) - taken).flatten(-2)
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
