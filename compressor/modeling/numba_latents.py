"""How queries and weights meet one latent, for numba's kernels.

Latents are unpacked a few tokens at a time into numbers, float32, that stay in a processor's
nearest memory; all queries that share the latent read them there. Where these are few, bfloat16
numbers and codes of 8 and 4 bits become levels on their way into a product, and are written
nowhere. Where a processor has tiles, four or more queries that are not float32 meet bfloat16
numbers there, and such codes as bfloat16 numbers, which hold them exactly. Scales and zero points
of levels are taken out of the products by :mod:`numba_scales`. What is stored is read by
:mod:`numba_levels` and multiplied by :mod:`numba_products` and :mod:`numba_tile_products`. Letters:
r rows (queries that share the latent), n tokens, B blocks of D dimensions that share a scale.
"""

from __future__ import annotations

from .numba_compiled import FAST, compiled
from .numba_lanes import holds_two
from .numba_levels import (
    dimension,
    read_as_bfloat16,
    read_factors,
    read_numbers,
    read_words,
    runs_of,
)
from .numba_memory import numbers_at
from .numba_part import (
    BFLOAT16,
    BITS,
    BLOCKS,
    CODES,
    CODES_B,
    CODES_G,
    FIRST,
    FLOAT32,
    FORM,
    LATENTS,
    NORMAL_FORM,
    ROW,
    SCALE,
    SCALE_B,
    SCALE_G,
    TOKEN_FORM,
    TOKENS,
    WIDTH,
    ZERO,
    ZERO_B,
    ZERO_G,
)
from .numba_products import WIDENED_ONCE, add_weighted, dots
from .numba_scales import take_lost, take_products, weights_of_levels
from .numba_tile_products import add_by_tiles, dots_by_tiles, lay_out, tiles_of
from .numba_tiles import PAIRS, enter_tiles, leave_tiles

try:
    import numpy as np
except ImportError as missing:
    raise ImportError("the package numpy is not installed") from missing

NEAR = 2**13  # numbers that are unpacked at a time: they stay in a processor's nearest memory
IN_TILES = 2**15  # likewise of numbers for tiles, of 2 bytes each
AHEAD = 2**12  # bytes from what is read to what memory is asked for
TILES_AHEAD = 128  # tokens, likewise, where tiles read them
SPARE = 16  # numbers for each token, where its codes do not fill their words
SCALED = (TOKEN_FORM, NORMAL_FORM)
WAYS = (AS_BFLOAT16, AS_BYTES, AS_HALVES, AS_WORDS, AS_NUMBERS, AS_TILES) = range(6)  # to read


@compiled("int64(int64, int64)")
def room_for_levels(step, widest):
    """Return how many numbers of room what is unpacked, or a row of scores, may need."""
    return max(NEAR, IN_TILES // 2, TOKENS * widest) + step * SPARE


@compiled()
def _way_of(part, rows, tiles):
    """Return how latents are read that so many queries share, which may meet them in tiles."""
    form, bits, few = part[FORM], part[BITS], rows < WIDENED_ONCE
    halves = bits == 4 and 2 * part[ROW] == part[WIDTH]
    known = form == BFLOAT16 or (form == TOKEN_FORM and (bits == 8 or halves))
    if tiles and known and not few and part[WIDTH] // max(part[BLOCKS], 1) % 2 == 0:
        return AS_TILES
    if few and form == BFLOAT16:
        return AS_BFLOAT16
    if few and form == TOKEN_FORM and bits == 8:
        return AS_BYTES
    if few and form == TOKEN_FORM and halves and part[BLOCKS] == 1:
        return AS_HALVES
    return AS_WORDS if runs_of(part) > 1 else AS_NUMBERS


@compiled()
def padded(part):
    """Return the width of a latent as it is met; its last words may not be full."""
    runs = runs_of(part)
    return -(-part[WIDTH] // runs) * runs


@compiled()
def arrange(query, rows, part, tiles, to, in_tiles):
    """Write queries [r * k] as a part's latents meet them, by latents and blocks.

    A latent and a block of it have rows [D] for the queries that share them, in the order of words;
    those that meet it in tiles are written so, too.
    """
    latents, runs, k = part[LATENTS], runs_of(part), query.shape[0] // rows
    shared = rows // latents
    way = _way_of(part, shared, tiles)
    blocks = max(part[BLOCKS], 1) if way in (AS_BYTES, AS_TILES) else 1
    size, i, last = padded(part) // blocks, 0, 0
    for latent in range(latents):
        for block in range(blocks):
            for r in range(latent * shared, (latent + 1) * shared):
                own = query[r * k + part[FIRST] + block * size :]
                for j in range(size):
                    dim = dimension(j, runs, size)
                    inside = dim < part[WIDTH]
                    to[i] = own[dim] if inside else np.float32(0)
                    i += 1
            if way == AS_TILES:
                lay_out(to[i - shared * size : i], size, in_tiles[last:])
                last += tiles_of(shared, size)


@compiled()
def numbers_in_tiles(part, rows, tiles):
    """Return how many numbers there are in tiles of the queries that share a latent."""
    if _way_of(part, rows, tiles) != AS_TILES:
        return 0
    blocks = max(part[BLOCKS], 1)
    return blocks * tiles_of(rows, part[WIDTH] // blocks)


@compiled(fastmath=FAST)
def _meet(
    x, ahead, scaled, part, is_value, queries, scores, first, sums, scale_at, zero_at, scale, zero,
    found,
):  # fmt: skip
    """Let the rows that share a latent meet its levels [n, B, D], tokens from ``first`` on.

    These are float32, or what is stored as :mod:`numba_lanes` reads it, in the order of words or of
    the latent; ``queries`` [B, r, D] and ``sums`` [r, B, D] have it too.
    """
    n, blocks, size = x.shape
    size = 2 * size if holds_two(x) else size
    rows = scores.shape[0]
    for block in range(blocks):
        if scaled:
            read_factors(part, scale_at, zero_at, n, block, scale, zero)
        if not is_value:
            own = queries[block * rows * size : (block + 1) * rows * size].reshape(rows, size)
            dots(own, x, ahead, block, found)
            take_products(scores, first, own, n, scaled, scale, zero, found)
        elif scaled:
            to = sums.reshape(rows, blocks, size)
            lost = weights_of_levels(scores, first, n, scale, zero, found)
            add_weighted(to, found, 0, x, ahead, block)
            take_lost(to, block, lost)
        else:
            add_weighted(sums.reshape(rows, blocks, size), scores, first, x, ahead, block)


@compiled(fastmath=FAST)
def _meet_in_tiles(
    x, ahead, scaled, part, is_value, queries, in_tiles, scores, first, sums, scale_at, zero_at,
    scale, zero, found,
):  # fmt: skip
    """Do so with bfloat16 numbers, or codes as such, uint16 [n, B, D], in tiles."""
    n, blocks, size = x.shape
    rows = scores.shape[0]
    each = tiles_of(rows, size)
    enter_tiles(size % PAIRS)
    for block in range(blocks):
        once = (ahead[0], ahead[1] if block == 0 else 0)
        if scaled:
            read_factors(part, scale_at, zero_at, n, block, scale, zero)
        if not is_value:
            own = queries[block * rows * size : (block + 1) * rows * size].reshape(rows, size)
            dots_by_tiles(in_tiles[block * each :], rows, x, once, block, found)
            take_products(scores, first, own, n, scaled, scale, zero, found)
        elif scaled:
            to = sums.reshape(rows, blocks, size)
            lost = weights_of_levels(scores, first, n, scale, zero, found)
            add_by_tiles(to, found, 0, x, once, block)
            take_lost(to, block, lost)
        else:
            add_by_tiles(sums.reshape(rows, blocks, size), scores, first, x, once, block)
    leave_tiles()


@compiled()
def _near(numbers, width):
    """Return how many tokens of a width are unpacked at a time, whole blocks of every scheme."""
    return max(numbers // (width * TOKENS), 1) * TOKENS


@compiled()
def meet_latent(
    part, b, g, low, n, is_value, tiles, queries, in_tiles, scores, sums, room, factors, scale,
    zero, found,
):  # fmt: skip
    """Let the rows that share a latent meet n tokens of it, from ``low`` on.

    What is unpacked is unpacked some tokens at a time: it stays in the nearest memory.
    """
    form, width, row = part[FORM], part[WIDTH], part[ROW]
    way, runs = _way_of(part, scores.shape[0], tiles), runs_of(part)
    scaled = form in SCALED
    blocks = part[BLOCKS] if scaled else 1
    in_room = (way == AS_WORDS) | (way == AS_NUMBERS) & (form != FLOAT32)
    in_room |= (way == AS_TILES) & scaled
    some = min(n, _near(IN_TILES if way == AS_TILES else NEAR, width)) if in_room else n
    for first in range(0, n, some):
        m, start = min(some, n - first), low + first
        stored = start * blocks if scaled else start // TOKENS * width
        at = part[CODES] + b * part[CODES_B] + g * part[CODES_G] + start * row
        scale_at = part[SCALE] + b * part[SCALE_B] + g * part[SCALE_G] + 2 * stored
        zero_at = part[ZERO] + b * part[ZERO_B] + g * part[ZERO_G] + stored
        where = (
            part, is_value, queries, scores, first, sums, scale_at, zero_at, scale, zero, found
        )  # fmt: skip
        far = TILES_AHEAD * row if way == AS_TILES else AHEAD
        ahead = (at + (m * row if in_room else far), row)
        if way == AS_TILES:
            if scaled:
                x = read_as_bfloat16(part, at, m, room)
            else:
                x = numbers_at(at, m * width, np.uint16)
            _meet_in_tiles(
                x.reshape(m, blocks, width // blocks), ahead, scaled, part, is_value, queries,
                in_tiles, scores, first, sums, scale_at, zero_at, scale, zero, found,
            )  # fmt: skip
        elif way == AS_BFLOAT16:
            x = numbers_at(at, m * width, np.uint16)
            _meet(x.reshape(m, 1, width), ahead, False, *where)
        elif way == AS_BYTES:
            x = numbers_at(at, m * width, np.uint8)
            _meet(x.reshape(m, blocks, width // blocks), ahead, True, *where)
        elif way == AS_HALVES:
            x = numbers_at(at, m * row, np.int8)
            _meet(x.reshape(m, 1, row), ahead, True, *where)
        elif way == AS_WORDS:
            x = read_words(part, at, m, runs, room)
            _meet(x.reshape(m, 1, x.size // m), ahead, True, *where)
        else:
            x = read_numbers(part, at, scale_at, zero_at, m, room, factors, zero)
            _meet(x.reshape(m, 1, width), ahead, False, *where)


@compiled()
def put_in_order(held, runs, sums, rows):
    """Write sums [r * v] of values that are held in the order of words."""
    size, v = held.shape[0] // rows, sums.shape[0] // rows
    for r in range(rows):
        for j in range(size):
            dim = dimension(j, runs, size)
            if dim < v:
                sums[r * v + dim] = held[r * size + j]
