"""Products of a few rows with many tokens, in the orders in which a processor multiplies them best.

Letters: l latents (of all sequences), r rows, s tokens, w width.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

FEW = 64  # rows
TOKENS = 1024  # of a sum
SEVERAL = 2  # rows of a product on tiles: with one alone it is slower
MOST_ROOM = 1.5  # read with the tokens


def dots(query: Tensor, latents: Tensor) -> Tensor:
    """Return the dot products [l, r, s] of [l, r, w] with [l, s, w]."""
    if _room_between(query, latents):
        whole = _with_room(latents) if multiplies_tiles() else None
        if whole is None:
            return torch.stack([x @ own.mT for x, own in zip(query, latents, strict=True)])
        return torch.bmm(whole, query.mT)[:, : latents.shape[1]].mT
    if not 1 < query.shape[1] <= FEW or query.device.type != "cpu":
        return torch.bmm(query, latents.mT)
    return torch.bmm(latents, query.mT).mT


def sums(weights: Tensor, latents: Tensor) -> Tensor:
    """Return the sums [l, r, w] of [l, s, w] with weights [l, r, s].

    In single precision many tokens of one latent are cut, so that every processor has some.
    """
    if _room_between(weights, latents):
        rows = weights.shape[1]
        if rows == 1 and multiplies_tiles():
            weights = weights.expand(-1, SEVERAL, -1).contiguous()
        each = [x @ own for x, own in zip(weights, latents, strict=True)]
        return torch.stack(each)[:, :rows]
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


def _room_between(rows: Tensor, latents: Tensor) -> bool:
    """Whether these are few rows in half precision, and latents with room between them.

    A cache has room. Products of many such matrices in half precision are slow in torch: it copies.
    """
    half = latents.element_size() == 2 and latents.device.type == "cpu"
    return half and rows.shape[1] <= FEW and not latents.is_contiguous()


def _with_room(latents: Tensor) -> Tensor | None:
    """Return latents [l, s, w] with the room behind each, so that they lie without gaps.

    None where they do not lie so, where the room is larger than a cache's, and where the memory of
    the last one ends before: nothing is copied.
    """
    count, tokens, width = latents.shape
    between, gap, one = latents.stride()
    room = between // width
    end = latents.storage_offset() + count * between
    gapless = gap == width and one == 1 and between % width == 0
    if not gapless or room > MOST_ROOM * tokens or end > latents.untyped_storage().nbytes() // 2:
        return None
    return latents.as_strided((count, room, width), (between, width, 1))


@cache
def multiplies_tiles() -> bool:
    """Whether this processor multiplies tiles of half precision (AMX)."""
    known = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return bool(known is not None and known())
