"""The scores of the decode kernels: queries as matrices, and their products with parts of the keys.

Letters: R rows of a block, N columns, U units of a piece.
"""

from __future__ import annotations

try:
    import triton
    import triton.language as tl
except ImportError as missing:
    raise ImportError("the package triton is not installed") from missing

from .decode_reading import (
    base_of,
    channel_scales,
    codes_of_units,
    element,
    field_of,
    length,
    numbers_of,
    piece_of,
    read_units,
    reads_latent,
    scores_shape,
    static,
    token_scales,
    two_to,
)

CODE = tl.constexpr(2.0**24)  # a code over its fp16 number that is not normalised
LEAST_ROWS = tl.constexpr(16)  # of a product


@triton.jit
def _query_tile(
    query,
    shrink,
    head,
    place,
    latent: tl.constexpr,
    TERM: tl.constexpr,
    TILE: tl.constexpr,
    SECTION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Return what one field of a piece is multiplied with, [U, N]."""
    at, code, inside = codes_of_units(
        piece_of(TILE, TERM), field_of(TILE, TERM), TILE, SECTION.tokens
    )
    inside = inside & (code // TILE.block == TILE.terms[TERM][0])
    kept = inside[:, None] & reads_latent(head, latent, TILE, SECTION)[None, :]
    kept = kept & (at[:, None] == place[None, :])
    where = query + head[None, :] * SECTION.query_stride + TILE.first + code[:, None]
    found = tl.load(where, mask=kept, other=0.0)
    if not TILE.exact:
        found = found.to(tl.float32) * shrink
        if not TILE.normal:
            found = found * two_to(-field_of(TILE, TERM).position)
        if not TILE.by_channel:
            found = found.to(tl.float16)
    if UPCAST:
        found = found.to(tl.float32)
    return found


@triton.jit
def query_range(query, head, SECTION: tl.constexpr):
    """Return the power of two that takes the queries of all columns into the range of fp16."""
    dims = tl.arange(0, SECTION.query_room)
    inside = (head < SECTION.heads)[:, None] & (dims < SECTION.query_width)[None, :]
    where = query + head[:, None] * SECTION.query_stride + dims[None, :]
    whole = tl.load(where, mask=inside, other=0.0).to(tl.float32)
    return tl.exp2(-tl.ceil(tl.log2(tl.maximum(tl.max(tl.abs(whole)), 1e-30))))


@triton.jit
def query_tiles(
    query,
    shrink,
    head,
    place,
    TILE: tl.constexpr,
    SECTION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Return the tiles of all products with a part, and for each of its scales their sums [N].

    A sum is what one unit of a zero point takes from a score; a product with ones makes it.
    """
    tiles = ()
    sums = ()
    for latent in tl.static_range(static(TILE.latents)):
        for t in tl.static_range(length(TILE.terms)):
            tiles = tiles + (
                _query_tile(query, shrink, head, place, latent, t, TILE, SECTION, UPCAST),
            )
        for block in tl.static_range(static(TILE.blocks)):
            total = tl.zeros([LEAST_ROWS, static(SECTION.columns)], tl.float32)
            if TILE.has_zero and not TILE.by_channel:
                for t in tl.static_range(length(TILE.terms)):
                    if TILE.terms[t][0] == block:
                        tile = tiles[latent * length(TILE.terms) + t]
                        power = two_to(field_of(TILE, t).position)
                        ones = tl.full([LEAST_ROWS, tile.shape[0]], power, tile.dtype)
                        total = tl.dot(ones, tile, total)
            sums = sums + (tl.sum(total, 0) * (TILE.zero_unit / LEAST_ROWS),)
    return tiles, sums


@triton.jit
def part_scores(  # noqa: PLR0912
    part,
    tiles,
    sums,
    scales,
    zeros,
    batch,
    group,
    first,
    left,
    grow,
    TILE: tl.constexpr,
    SECTION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Return the products of a part's tokens with the queries, [R, N]."""
    total = tl.zeros(scores_shape(SECTION), tl.float32)
    for latent in tl.static_range(static(TILE.latents)):
        number = group * TILE.latents + latent
        base = base_of(part, batch, number, TILE)
        units = ()
        for p in tl.static_range(length(TILE.pieces)):
            units = units + (
                read_units(base, first, left, element(TILE.pieces, p), TILE, SECTION, 0),
            )
        for block in tl.static_range(static(TILE.blocks)):
            found = tl.zeros(scores_shape(SECTION), tl.float32)
            other = tl.zeros(scores_shape(SECTION), tl.float32)
            for t in tl.static_range(length(TILE.terms)):
                if TILE.terms[t][0] == block:
                    tile = tiles[latent * length(TILE.terms) + t]
                    field = numbers_of(units[TILE.terms[t][1]], field_of(TILE, t), TILE, UPCAST)
                    if TILE.by_channel:
                        scale, zero = channel_scales(
                            scales[latent * length(TILE.terms) + t],
                            zeros[latent * length(TILE.terms) + t],
                            TILE,
                        )
                        top = tl.maximum(tl.max(scale, 0), 1e-30)
                        scaled = (tile * (scale / top)[:, None]).to(tl.float16)
                        level = tl.broadcast_to(zero[None, :].to(tl.float16), field.shape)
                        if UPCAST:
                            scaled = scaled.to(tl.float32)
                            level = level.to(tl.float32)
                        power = two_to(field_of(TILE, t).position)
                        found += tl.dot(field, scaled) * (top * CODE)
                        found -= tl.dot(level, scaled) * (top * power)
                    elif t % 2:  # two sums side by side: a product waits for the one before it
                        other = tl.dot(field, tile, other)
                    else:
                        found = tl.dot(field, tile, found)
            found += other
            if TILE.exact:
                total += found
            elif TILE.by_channel:
                total += found * grow
            else:
                scale, zero = token_scales(
                    scales[latent * TILE.blocks + block],
                    zeros[latent * TILE.blocks + block],
                    TILE,
                    SECTION,
                )
                scale *= grow
                if TILE.has_zero:
                    total -= (scale * zero) * sums[latent * TILE.blocks + block][None, :]
                    scale *= CODE
                total += found * scale
    return total


@triton.jit
def masked_scores(scores, mask, mask_h, head, token, alive, MASK: tl.constexpr):
    """Return scores of tokens that a column attends to, the others' at minus infinity."""
    if MASK != 0:
        place = mask + head[None, :] * mask_h + token
        if MASK == 1:
            alive = alive & (tl.load(place, mask=alive, other=0) != 0)
        else:
            added = tl.load(place, mask=alive, other=0.0).to(tl.float32)
            scores += added * 1.4426950408889634
    return tl.where(alive, scores, -float("inf"))
