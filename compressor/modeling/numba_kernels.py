"""The kernels of :mod:`numba_decode`: one query attends over latents on a CPU.

A unit of work is some tokens of one sequence and one group of heads. Latents are unpacked a few
tokens at a time into levels, float32, that stay in a processor's nearest memory; all heads of the
group read them there. Where few heads share a latent, bfloat16 numbers and codes of 8 and 4 bits
become levels on their way into a product, and are written nowhere. A unit leaves the weighted sum
of its values beside its norm and the power of two that both are relative to, and :func:`_join`
joins them. Scales and zero points of tokens are taken out of the products, as in
:mod:`packed_products`.

What is stored is read by :mod:`numba_levels` and multiplied by :mod:`numba_products`. Letters: r
rows (queries of a group), n tokens, w width, B blocks of D dimensions that share a scale.
"""

from __future__ import annotations

from .numba_compiled import FAST, compiled
from .numba_lanes import holds_two
from .numba_levels import (
    dimension,
    read_factors,
    read_levels,
    read_words,
    runs_of,
    widen_bfloat16,
    widen_float16,
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
    SPAN_TOKENS,
    START,
    TOKEN_FORM,
    TOKENS,
    WIDTH,
    ZERO,
    ZERO_B,
    ZERO_G,
)
from .numba_products import four_products, products, weighted

try:
    import numba
    import numpy as np
except ImportError as missing:
    raise ImportError("the package numba is not installed, or too old for numpy") from missing

WIDENED_ONCE = 4  # queries of a latent from which on its numbers are written wide, once for all
SPARE = 16  # numbers for each latent, where its codes do not fill their words
LOWEST = np.float32(-1e30)  # of what is not attended to: finite, so that differences are numbers
NOTHING = np.float32(-5e29)  # above that and below any score
SMALLEST = np.float32(-126.0)
# 2 ** f for 0 <= f < 1 at Chebyshev's points: 2e-8 of it at most, below float32's own rounding.
_POWERS = np.polynomial.chebyshev.Chebyshev.interpolate(np.exp2, 6, [0, 1])
C = tuple(np.float32(c) for c in _POWERS.convert(kind=np.polynomial.Polynomial).coef)
MOST_THREADS: int = vars(numba.config)["NUMBA_NUM_THREADS"]


def room_for(step: int, widest: int) -> int:
    """Return how many numbers of room a thread needs: levels, then scales, then factors."""
    return step * (widest + SPARE) + step + max(step, widest)


@compiled(fastmath={"nnan", "nsz"})
def _highest(x):
    top = x[0]
    for j in range(x.shape[0]):
        top = max(top, x[j])
    return top


@compiled(fastmath=FAST)
def _powers_of_two(x, top, whole):
    """Write 2 ** (x - top) over x and return their sum; ``whole`` is room."""
    bits = whole.view(np.uint32)
    for j in range(x.shape[0]):
        power = np.int32(np.floor(max(x[j] - top, SMALLEST)))
        bits[j] = np.uint32(power + np.int32(127)) << np.uint32(23)
    total = np.float32(0)
    for j in range(x.shape[0]):
        own = x[j] - top
        kept = max(own, SMALLEST)
        f = kept - np.floor(kept)
        found = C[0] + f * (C[1] + f * (C[2] + f * (C[3] + f * (C[4] + f * (C[5] + f * C[6])))))
        found = found * whole[j] if own > SMALLEST else own * np.float32(0)  # NaN stays NaN
        x[j] = found
        total += found
    return total


@compiled(fastmath=FAST)
def _add_scores(scores, query, x, block, scaled, scales, zeros, found):
    """Add to scores [r, n] the products of queries [r, D] with a block of levels [n, B, D]."""
    rows, n = query.shape[0], x.shape[0]
    for r in range(0, rows, 4):
        if r + 4 <= rows:
            four_products(query[r:], x, block, found)
        else:
            for s in range(r, rows):
                products(query[s], x, block, found[s - r])
        for s in range(r, min(r + 4, rows)):
            to, own = scores[s], found[s - r]
            if scaled:
                total = _sum(query[s])
                for t in range(n):
                    to[t] += scales[t] * (own[t] - zeros[t] * total)
            else:
                for t in range(n):
                    to[t] += own[t]


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
def _add_values(sums, weights, x, block, scaled, scales, zeros, room):
    """Add to sums [r, B, D] a block of levels [n, B, D] times weights [r, n]."""
    for r in range(sums.shape[0]):
        out, own, lost = sums[r, block], weights[r], np.float32(0)
        if scaled:
            lost = _scaled(own, x.shape[0], scales, zeros, room)
            own = room
        weighted(out, own, x, block)
        if scaled:
            for j in range(out.shape[0]):
                out[j] -= lost


@compiled(fastmath=FAST)
def _weigh(scores, n, marks, sums, room):
    """Make weights of n scores of each row, relative to the marks, which may rise."""
    rows, v = scores.shape[0], sums.shape[0] // scores.shape[0]
    for r in range(rows):
        own = scores[r, :n]
        top = max(marks[r], _highest(own))
        kept = np.float32(2.0) ** (marks[r] - top)
        marks[r] = top
        marks[rows + r] = marks[rows + r] * kept + _powers_of_two(own, top, room)
        if kept != 1:
            for j in range(r * v, (r + 1) * v):
                sums[j] *= kept


@compiled(fastmath=FAST)
def _meet(
    x, part, runs, is_value, query, start, shared, scores, sums, queries, scale_at, zero_at, scale,
    zero, found,
):  # fmt: skip
    """Let the rows that share a latent, from ``start`` on, meet its levels [n, B, D].

    These are float32, or what is stored as :mod:`numba_lanes` reads it. They are in the order of
    words of so many ``runs``, or of the latent.
    """
    n, blocks, size = x.shape
    size = 2 * size if holds_two(x) else size
    k, v = query.shape[0] // scores.shape[0], sums.shape[0] // scores.shape[0]
    stop = start + shared
    scaled = part[FORM] in (TOKEN_FORM, NORMAL_FORM)
    for block in range(blocks):
        if scaled:
            read_factors(part, scale_at, zero_at, n, block, scale, zero)
        if is_value:
            to = sums[start * v : stop * v].reshape(shared, blocks, size)
            _add_values(to, scores[start:stop], x, block, scaled, scale, zero, found[0])
        else:
            own = queries[: shared * size].reshape(shared, size)
            first = part[FIRST] + block * size
            for r in range(shared):
                for j in range(size):
                    dim = dimension(j, runs, size)
                    inside = dim < part[WIDTH]  # the last words may not be full
                    own[r, j] = query[(start + r) * k + first + dim] if inside else np.float32(0)
            _add_scores(scores[start:stop], own, x, block, scaled, scale, zero, found)


@compiled()
def _put_in_order(held, runs, sums, rows):
    """Write sums [r * v] of values that are held in the order of words."""
    size, v = held.shape[0] // rows, sums.shape[0] // rows
    for r in range(rows):
        for j in range(size):
            dim = dimension(j, runs, size)
            if dim < v:
                sums[r * v + dim] = held[r * size + j]


@compiled()
def _read_query(address, form, factor, out):
    """Write the numbers of a query, which are stored in a form, times a factor."""
    if form == FLOAT32:
        out[:] = numbers_at(address, out.shape[0], np.float32)
    elif form == BFLOAT16:
        widen_bfloat16(numbers_at(address, out.shape[0], np.uint16), out)
    else:
        widen_float16(numbers_at(address, out.shape[0], np.uint16), out)
    for j in range(out.shape[0]):
        out[j] *= factor


@compiled()
def _begin(scores, mask, b, group, low, n):
    """Write to scores [r, n] what the mask adds to those of tokens from ``low`` on."""
    scores[:] = 0
    if mask.shape[0]:
        own = mask[min(b, mask.shape[0] - 1)]
        for r in range(scores.shape[0]):
            head = min(group * scores.shape[0] + r, own.shape[0] - 1)
            for t in range(n):
                scores[r, t] = own[head, low + t]


@compiled()
def _attend_some(query, table, start, stop, mask, rows, b, group, step, sums, marks, room):
    """Attend with queries [r * k] over some tokens of a span; sums [r * v], marks [2 * r]."""
    values, most = table.shape[0] - 1, 0
    for p in range(table.shape[0]):
        most = max(most, table[p, WIDTH])
    scale = room[step * (most + SPARE) :]
    factors = scale[step:]
    scores, found = np.empty((rows, step), np.float32), np.empty((4, step), np.float32)
    zero, queries = np.zeros(step, np.float32), np.empty(rows * (most + SPARE), np.float32)
    order = runs_of(table[values])
    size = -(-table[values, WIDTH] // order) * order
    held = np.empty(rows * size, np.float32) if order > 1 else sums
    held[:] = 0
    marks[:rows] = NOTHING
    marks[rows:] = 0
    for low in range(start, stop, step):
        n = min(step, stop - low)
        _begin(scores, mask, b, group, table[values, START] + low, n)
        for p in range(values + 1):
            part, latents, width = table[p], table[p, LATENTS], table[p, WIDTH]
            if width == 0:
                continue
            if p == values:
                _weigh(scores, n, marks, held, room)
            form, row = part[FORM], part[ROW]
            scaled = form in (TOKEN_FORM, NORMAL_FORM)
            blocks, shared = part[BLOCKS] if scaled else 1, rows // latents
            runs = runs_of(part)
            size = -(-width // runs) * runs // blocks
            stored = low * blocks if scaled else low // TOKENS * width
            few = shared < WIDENED_ONCE
            for latent in range(latents):
                g = group * latents + latent
                at = part[CODES] + b * part[CODES_B] + g * part[CODES_G] + low * row
                scale_at = part[SCALE] + b * part[SCALE_B] + g * part[SCALE_G] + 2 * stored
                zero_at = part[ZERO] + b * part[ZERO_B] + g * part[ZERO_G] + stored
                where = (
                    part, runs, p == values, query, latent * shared, shared, scores, held, queries,
                    scale_at, zero_at, scale, zero, found,
                )  # fmt: skip
                if few and form == BFLOAT16:
                    x = numbers_at(at, n * width, np.uint16)
                    _meet(x.reshape(n, blocks, size), *where)
                elif few and form == TOKEN_FORM and part[BITS] == 8:
                    x = numbers_at(at, n * width, np.uint8)
                    _meet(x.reshape(n, blocks, size), *where)
                elif few and form == TOKEN_FORM and part[BITS] == 4 and 2 * row == size:
                    x = numbers_at(at, n * row, np.int8)
                    _meet(x.reshape(n, 1, row), *where)
                elif runs > 1:
                    x = read_words(part, at, n, runs, room)
                    _meet(x.reshape(n, blocks, size), *where)
                else:
                    x = read_levels(part, at, scale_at, zero_at, n, room, factors)
                    _meet(x.reshape(n, blocks, size), *where)
    if order > 1:
        _put_in_order(held, order, sums, rows)


@compiled(fastmath=FAST)
def _join(sums, marks, out):
    """Write the averages [r, v] of sums [s, r * v] of some tokens each, with marks [s, 2 * r]."""
    rows, v = out.shape
    for r in range(rows):
        top, norm = NOTHING, np.float32(0)
        for s in range(sums.shape[0]):
            top = max(top, marks[s, r])
        out[r] = 0
        for s in range(sums.shape[0]):
            kept = np.float32(2.0) ** (marks[s, r] - top)
            norm += kept * marks[s, rows + r]
            for j in range(v):
                out[r, j] += kept * sums[s, r * v + j]
        if norm != 0:
            for j in range(v):
                out[r, j] /= norm


@compiled(parallel=True)
def attend(query, out, read, work):
    """Attend with one query for each sequence.

    Args:
        query: address of numbers [b, groups, r, k], the form in which these are stored, and the
            factor of the scores, float32, times the logarithm of e to base 2.
        out: address of float32 [b, groups, r, v], which are written, and b, groups and r.
        read: the table, int64 [spans, parts, :data:`FIELDS`] with the values last; the mask, which
            is added to scores, float32 [b or 1, h or 1, s], or [0, 0, 0]; room, float32 [threads,
            :func:`room_for` a unit].
        work: pieces in which each span is cut, one of which for one group is a unit of work, and
            tokens that are unpacked at a time.
    """
    address, form, factor = query
    to, batch, groups, rows = out
    table, mask, room = read
    pieces, step = work
    spans, k, v = table.shape[0], 0, table[0, -1, WIDTH]
    for p in range(table.shape[1] - 1):
        k += table[0, p, WIDTH]
    size, pairs = rows * k * (4 if form == FLOAT32 else 2), batch * groups
    sums = np.empty((pairs, pieces, spans, rows * v), np.float32)
    marks = np.empty((pairs, pieces, spans, 2 * rows), np.float32)
    for unit in numba.prange(pairs * pieces):
        piece, pair = unit % pieces, unit // pieces
        own = np.empty(rows * k, np.float32)
        _read_query(address + pair * size, form, factor, own)
        for s in range(spans):
            tokens = table[s, -1, SPAN_TOKENS]
            share = -(-tokens // (pieces * TOKENS)) * TOKENS
            _attend_some(
                own, table[s], min(piece * share, tokens), min((piece + 1) * share, tokens), mask,
                rows, pair // groups, pair % groups, step, sums[pair, piece, s],
                marks[pair, piece, s], room[numba.get_thread_id()],
            )  # fmt: skip
    for pair in range(pairs):
        left = sums[pair].reshape(pieces * spans, rows * v)
        found = numbers_at(to + pair * rows * v * 4, rows * v, np.float32).reshape(rows, v)
        _join(left, marks[pair].reshape(pieces * spans, 2 * rows), found)
