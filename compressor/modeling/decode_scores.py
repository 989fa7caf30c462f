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
ONES_CHAINS = tl.constexpr(4)  # sums of queries that run side by side


@triton.constexpr_function
def one_for_all(tile, section):
    """Return whether a query is read once for all tokens of a row, not once for each.

    Measured: that gains from 3 bits to 8, where a row has no other head's columns.
    """
    packed = not tile.exact and tile.bits > 2
    return packed and section.heads == 1 and section.tokens == section.columns


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
    own = at[:, None] == place[None, :]
    if one_for_all(TILE, SECTION):
        found = tl.load(query + TILE.first + code, mask=inside, other=0.0)[:, None]
    else:
        kept = inside[:, None] & reads_latent(head, latent, TILE, SECTION)[None, :] & own
        where = query + head[None, :] * SECTION.query_stride + TILE.first + code[:, None]
        found = tl.load(where, mask=kept, other=0.0)
    if not TILE.exact:
        found = found.to(tl.float32) * shrink
        if not TILE.normal:
            found = found * two_to(-field_of(TILE, TERM).position)
        if not TILE.by_channel:
            found = found.to(tl.float16)
    if one_for_all(TILE, SECTION):
        found = tl.where(own, found, 0.0).to(found.dtype)
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
def added_up(chains):
    """Return the sum of what ran side by side."""
    found = chains[0]
    for c in tl.static_range(1, length(chains)):
        found += chains[c]
    return found


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
            chains = ()
            for _ in tl.static_range(ONES_CHAINS):
                chains = chains + (tl.zeros([LEAST_ROWS, static(SECTION.columns)], tl.float32),)
            if TILE.has_zero and not TILE.by_channel:
                for t in tl.static_range(length(TILE.terms)):
                    if TILE.terms[t][0] == block:
                        tile = tiles[latent * length(TILE.terms) + t]
                        power = two_to(field_of(TILE, t).position)
                        ones = tl.full([LEAST_ROWS, tile.shape[0]], power, tile.dtype)
                        chains = chains[1:] + (tl.dot(ones, tile, chains[0]),)
            total = added_up(chains)
            sums = sums + (tl.sum(total, 0) * (TILE.zero_unit / LEAST_ROWS),)
    return tiles, sums


@triton.constexpr_function
def chains_of(tile):
    """Return how many sums run side by side: a product waits for the one before it."""
    if tile.by_channel:
        return 1
    return 4 if tile.bits == 4 else 2


@triton.jit
def _product_by_channel(
    field,
    tile,
    scale,
    zero,
    FIELD: tl.constexpr,
    TILE: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Return the product of codes [R, U], whose scales [U] are their dimensions', with queries."""
    scale, zero = channel_scales(scale, zero, TILE)
    top = tl.maximum(tl.max(scale, 0), 1e-30)
    scaled = (tile * (scale / top)[:, None]).to(tl.float16)
    level = tl.broadcast_to(zero[None, :].to(tl.float16), field.shape)
    if UPCAST:
        scaled = scaled.to(tl.float32)
        level = level.to(tl.float32)
    found = tl.dot(field, scaled) * (top * CODE)
    return found - tl.dot(level, scaled) * (top * two_to(FIELD.position))


@triton.jit
def part_scores(
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
            chains = ()
            for _ in tl.static_range(static(chains_of(TILE))):
                chains = chains + (tl.zeros(scores_shape(SECTION), tl.float32),)
            for t in tl.static_range(length(TILE.terms)):
                if TILE.terms[t][0] == block:
                    tile = tiles[latent * length(TILE.terms) + t]
                    field = numbers_of(units[TILE.terms[t][1]], field_of(TILE, t), TILE, UPCAST)
                    if TILE.by_channel:
                        added = _product_by_channel(
                            field,
                            tile,
                            scales[latent * length(TILE.terms) + t],
                            zeros[latent * length(TILE.terms) + t],
                            field_of(TILE, t),
                            TILE,
                            UPCAST,
                        )
                        chains = (chains[0] + added,)
                    else:
                        chains = chains[1:] + (tl.dot(field, tile, chains[0]),)
            found = added_up(chains)
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
