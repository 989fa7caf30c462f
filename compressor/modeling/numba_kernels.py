"""The kernels of :mod:`numba_decode`: one query attends over latents on a CPU.

A unit of work is some tokens of one sequence and one group of heads. Latents are unpacked a few
tokens at a time into levels, float32, that stay in a processor's nearest memory; all heads of the
group read them there. Where few heads share a latent, bfloat16 numbers and codes of 8 and 4 bits
become levels on their way into a product, and are written nowhere. A unit leaves the weighted sum
of its values beside its norm and the power of two that both are relative to, and :func:`join`
joins them. Scales and zero points of tokens are taken out of the products, as in
:mod:`packed_products`.

What is stored is read by :mod:`numba_levels` and multiplied by :mod:`numba_products`. Letters: r
rows (queries of a group), n tokens, w width, B blocks of D dimensions that share a scale.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from .numba_compiled import FAST, compiled
from .numba_lanes import holds_two
from .numba_levels import dimension, read_factors, read_levels, read_words, runs_of
from .numba_part import (
    BFLOAT16,
    BITS,
    BLOCKS,
    CODES,
    CODES_B,
    CODES_G,
    FIRST,
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


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let kernels run on so many threads, at most :data:`MOST_THREADS`."""
    before = numba.get_num_threads()
    if before == count:  # to say so again takes longer than a small cache
        yield
        return
    numba.set_num_threads(count)
    try:
        yield
    finally:
        numba.set_num_threads(before)


@compiled(fastmath={"nnan", "nsz"})
def _highest(x):
    top = x[0]
    for j in range(x.shape[0]):
        top = max(top, x[j])
    return top


@compiled(fastmath=FAST)
def _powers_of_two(x, top, whole, bits):
    """Write 2 ** (x - top) over x and return their sum; whole, whose bits are bits, is room."""
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
def _weigh(scores, n, marks, sums, room, bits):
    """Make weights of n scores of each row, relative to the marks, which may rise."""
    rows, v = scores.shape[0], sums.shape[0] // scores.shape[0]
    for r in range(rows):
        own = scores[r, :n]
        top = max(marks[r], _highest(own))
        kept = np.float32(2.0) ** (marks[r] - top)
        marks[r] = top
        marks[rows + r] = marks[rows + r] * kept + _powers_of_two(own, top, room, bits)
        if kept != 1:
            for j in range(r * v, (r + 1) * v):
                sums[j] *= kept


@compiled(fastmath=FAST)
def _meet(
    x, part, runs, is_value, query, start, shared, scores, sums, queries, scales, zeros, scale_at,
    zero_at, scale, scale_bits, zero, found,
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
            read_factors(
                part, scales, zeros, scale_at, zero_at, n, block, scale, scale_bits, zero
            )  # fmt: skip
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
def _begin(scores, mask, b, group, low, n):
    """Write to scores [r, n] what the mask adds to them."""
    scores[:] = 0
    if mask.shape[0]:
        own = mask[min(b, mask.shape[0] - 1)]
        for r in range(scores.shape[0]):
            head = min(group * scores.shape[0] + r, own.shape[0] - 1)
            for t in range(n):
                scores[r, t] = own[head, low + t]


@compiled()
def _attend_some(
    query, table, curves, numbers, halves, codes, scales, zeros, mask, rows, b, group, start, stop,
    step, sums, marks, room, room_bits,
):  # fmt: skip
    """Attend with queries [r * k] over the tokens of a unit; sums [r * v], marks [2 * r]."""
    values, most = table.shape[0] - 1, 0
    for p in range(table.shape[0]):
        most = max(most, table[p, WIDTH])
    levels = step * (most + SPARE)
    scale, scale_bits = room[levels:], room_bits[levels:]
    factors, factor_bits = room[levels + step :], room_bits[levels + step :]
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
        _begin(scores, mask, b, group, low, n)
        for p in range(values + 1):
            part, latents, width = table[p], table[p, LATENTS], table[p, WIDTH]
            if width == 0:
                continue
            if p == values:
                _weigh(scores, n, marks, held, room, room_bits)
            form = part[FORM]
            scaled = form in (TOKEN_FORM, NORMAL_FORM)
            blocks, shared = part[BLOCKS] if scaled else 1, rows // latents
            runs = runs_of(part)
            size = -(-width // runs) * runs // blocks
            for latent in range(latents):
                g = group * latents + latent
                at = part[CODES] + b * part[CODES_B] + g * part[CODES_G] + low * part[ROW]
                stored = low * blocks if scaled else low // TOKENS * width
                scale_at = part[SCALE] + b * part[SCALE_B] + g * part[SCALE_G] + stored
                zero_at = part[ZERO] + b * part[ZERO_B] + g * part[ZERO_G] + stored
                where = (
                    part, runs, p == values, query, latent * shared, shared, scores, held, queries,
                    scales[p], zeros[p], scale_at, zero_at, scale, scale_bits, zero, found,
                )  # fmt: skip
                few, row = shared < WIDENED_ONCE, part[ROW]
                if few and form == BFLOAT16:
                    x = halves[p][at : at + n * width]
                    _meet(x.reshape(n, blocks, size), *where)
                elif few and form == TOKEN_FORM and part[BITS] == 8:
                    x = codes[p][at : at + n * width]
                    _meet(x.reshape(n, blocks, size), *where)
                elif few and form == TOKEN_FORM and part[BITS] == 4 and 2 * row == size:
                    x = codes[p][at : at + n * row].view(np.int8)
                    _meet(x.reshape(n, 1, row), *where)
                elif runs > 1:
                    x = read_words(part, curves[p], codes[p], at, n, runs, room)
                    _meet(x.reshape(n, blocks, size), *where)
                else:
                    x = read_levels(
                        part, curves[p], numbers[p], halves[p], codes[p], scales[p], zeros[p], at,
                        scale_at, zero_at, n, room, room_bits, factors, factor_bits,
                    )  # fmt: skip
                    _meet(x.reshape(n, blocks, size), *where)
    if order > 1:
        _put_in_order(held, order, sums, rows)


@compiled(parallel=True)
def attend(
    query, table, curves, numbers, halves, codes, scales, zeros, mask, groups, tokens, share, step,
    sums, marks, room, room_bits,
):  # fmt: skip
    """Attend over one span.

    Args:
        query: float32 [b, h * k], times the factor of the scores and the logarithm of e to base 2.
        table: int64 [parts, fields]; the values are the last part.
        curves: float32 [parts, 2], of levels of normal numbers.
        numbers: of each part the memory of its latents as float32, where these are its numbers.
        halves: likewise as uint16, where they have 16 bits.
        codes: likewise as uint8, where they are packed.
        scales: likewise, fp16 numbers as uint16.
        zeros: likewise, uint8.
        mask: float32 [b or 1, h or 1, s], added to scores; [0, 0, 0] for none.
        groups: of heads.
        tokens: of the span.
        share: tokens of a unit, a multiple of :data:`TOKENS`.
        step: tokens that are unpacked at a time.
        sums: float32 [b, groups, splits, r * v], written.
        marks: float32 [b, groups, splits, 2 * r]: the powers of two and the norms, written.
        room: float32 [threads, :func:`room_for` a unit].
        room_bits: the same memory as uint32.
    """
    b, splits, rows = query.shape[0], sums.shape[2], marks.shape[3] // 2
    size = query.shape[1] // groups
    for unit in numba.prange(b * groups * splits):
        split, pair = unit % splits, unit // splits
        group, one = pair % groups, pair // groups
        _attend_some(
            query[one, group * size : (group + 1) * size],
            table, curves, numbers, halves, codes, scales, zeros, mask, rows, one, group,
            min(split * share, tokens), min((split + 1) * share, tokens), step,
            sums[one, group, split], marks[one, group, split],
            room[numba.get_thread_id()], room_bits[numba.get_thread_id()],
        )  # fmt: skip


@compiled(fastmath=FAST)
def join(sums, marks, out):
    """Write the averages [b, groups, r, v] of what the units left."""
    rows, v = out.shape[2], out.shape[3]
    for b in range(out.shape[0]):
        for g in range(out.shape[1]):
            for r in range(out.shape[2]):
                top = NOTHING
                for s in range(sums.shape[2]):
                    top = max(top, marks[b, g, s, r])
                to, norm = out[b, g, r], np.float32(0)
                to[:] = 0
                for s in range(sums.shape[2]):
                    kept = np.float32(2.0) ** (marks[b, g, s, r] - top)
                    norm += kept * marks[b, g, s, rows + r]
                    for j in range(v):
                        to[j] += kept * sums[b, g, s, r * v + j]
                if norm != 0:
                    for j in range(to.shape[0]):
                        to[j] /= norm
