"""How queries and weights meet one latent, for numba's kernels.

Latents are unpacked a few tokens at a time into numbers, float32, that stay in a processor's
nearest memory; all queries that share the latent read them there. Where these are few, bfloat16
numbers and codes of 8 and 4 bits become levels on their way into a product, and are written
nowhere. Scales and zero points of levels are taken out of the products, as in
:mod:`packed_products`. What is stored is read by :mod:`numba_levels` and multiplied by
:mod:`numba_products`. Letters: r rows (queries that share the latent), n tokens, B blocks of D
dimensions that share a scale.
"""

from __future__ import annotations

from .numba_compiled import FAST, compiled
from .numba_lanes import holds_two
from .numba_levels import dimension, read_factors, read_numbers, read_words, runs_of
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

try:
    import numpy as np
except ImportError as missing:
    raise ImportError("the package numpy is not installed") from missing

NEAR = 2**13  # numbers that are unpacked at a time: they stay in a processor's nearest memory
AHEAD = 2**12  # bytes from what is read to what memory is asked for
SPARE = 16  # numbers for each token, where its codes do not fill their words
SCALED = (TOKEN_FORM, NORMAL_FORM)
WAYS = (AS_BFLOAT16, AS_BYTES, AS_HALVES, AS_WORDS, AS_NUMBERS) = range(5)  # to read latents


@compiled("int64(int64, int64)")
def room_for_levels(step, widest):
    """Return how many numbers of room what is unpacked, or a row of scores, may need."""
    return max(NEAR, TOKENS * widest) + step * SPARE


@compiled(fastmath=FAST)
def _sum(x):
    total = np.float32(0)
    for j in range(x.shape[0]):
        total += x[j]
    return total


@compiled(fastmath=FAST)
def _scaled(weights, n, scales, zeros, own):
    """Write n weights times scales, and return their sum with the zero points."""
    lost = np.float32(0)
    for t in range(n):
        own[t] = weights[t] * scales[t]
    for t in range(n):
        lost += own[t] * zeros[t]
    return lost


@compiled(fastmath=FAST)
def _add_scores(scores, first, query, x, ahead, block, scaled, scales, zeros, found):
    """Add to scores [r, n], from ``first`` on, products of queries [r, D] with levels [n, B, D]."""
    n = x.shape[0]
    dots(query, x, ahead, block, found)
    for r in range(query.shape[0]):
        to, own = scores[r, first : first + n], found[r]
        if scaled:
            total = _sum(query[r])
            for t in range(n):
                to[t] += scales[t] * (own[t] - zeros[t] * total)
        else:
            for t in range(n):
                to[t] += own[t]


@compiled(fastmath=FAST)
def _add_values(sums, weights, first, x, ahead, block, scaled, scales, zeros, room):
    """Add to sums [r, B, D] levels [n, B, D] times weights [r, n] from ``first`` on."""
    if not scaled:
        add_weighted(sums, weights, first, x, ahead, block)
        return
    n, lost = x.shape[0], np.empty(sums.shape[0], np.float32)
    for r in range(sums.shape[0]):
        lost[r] = _scaled(weights[r, first : first + n], n, scales, zeros, room[r])
    add_weighted(sums, room, 0, x, ahead, block)
    for r in range(sums.shape[0]):
        out = sums[r, block]
        for j in range(out.shape[0]):
            out[j] -= lost[r]


@compiled()
def _way_of(part, rows):
    """Return how latents are read that so many queries share."""
    form, bits, few = part[FORM], part[BITS], rows < WIDENED_ONCE
    if few and form == BFLOAT16:
        return AS_BFLOAT16
    if few and form == TOKEN_FORM and bits == 8:
        return AS_BYTES
    whole = part[BLOCKS] == 1 and 2 * part[ROW] == part[WIDTH]
    if few and form == TOKEN_FORM and bits == 4 and whole:
        return AS_HALVES
    return AS_WORDS if runs_of(part) > 1 else AS_NUMBERS


@compiled()
def padded(part):
    """Return the width of a latent as it is met; its last words may not be full."""
    runs = runs_of(part)
    return -(-part[WIDTH] // runs) * runs


@compiled()
def arrange(query, rows, part, to):
    """Write queries [r * k] as a part's latents meet them, by latents and blocks.

    A latent and a block of it have rows [D] for the queries that share them, in the order of words.
    """
    latents, runs, k = part[LATENTS], runs_of(part), query.shape[0] // rows
    shared = rows // latents
    blocks = part[BLOCKS] if _way_of(part, shared) == AS_BYTES else 1
    size, i = padded(part) // blocks, 0
    for latent in range(latents):
        for block in range(blocks):
            for r in range(latent * shared, (latent + 1) * shared):
                own = query[r * k + part[FIRST] + block * size :]
                for j in range(size):
                    dim = dimension(j, runs, size)
                    inside = dim < part[WIDTH]
                    to[i] = own[dim] if inside else np.float32(0)
                    i += 1


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
        if is_value:
            to = sums.reshape(rows, blocks, size)
            _add_values(to, scores, first, x, ahead, block, scaled, scale, zero, found)
        else:
            own = queries[block * rows * size : (block + 1) * rows * size].reshape(rows, size)
            _add_scores(scores, first, own, x, ahead, block, scaled, scale, zero, found)


@compiled()
def _near(width):
    """Return how many tokens of a width are unpacked at a time, whole blocks of every scheme."""
    return max(NEAR // (width * TOKENS), 1) * TOKENS


@compiled()
def meet_latent(
    part, b, g, low, n, is_value, queries, scores, sums, room, factors, scale, zero, found
):  # fmt: skip
    """Let the rows that share a latent meet n tokens of it, from ``low`` on.

    What is unpacked is unpacked some tokens at a time: it stays in the nearest memory.
    """
    form, width, row = part[FORM], part[WIDTH], part[ROW]
    way, runs, scaled = _way_of(part, scores.shape[0]), runs_of(part), form in SCALED
    blocks = part[BLOCKS] if scaled else 1
    stays = (way == AS_WORDS) | (way == AS_NUMBERS) & (form != FLOAT32)
    some = min(n, _near(width)) if stays else n
    for first in range(0, n, some):
        m, start = min(some, n - first), low + first
        stored = start * blocks if scaled else start // TOKENS * width
        at = part[CODES] + b * part[CODES_B] + g * part[CODES_G] + start * row
        scale_at = part[SCALE] + b * part[SCALE_B] + g * part[SCALE_G] + 2 * stored
        zero_at = part[ZERO] + b * part[ZERO_B] + g * part[ZERO_G] + stored
        where = (
            part, is_value, queries, scores, first, sums, scale_at, zero_at, scale, zero, found
        )  # fmt: skip
        ahead = (at + (m * row if stays else AHEAD), row)
        if way == AS_BFLOAT16:
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
