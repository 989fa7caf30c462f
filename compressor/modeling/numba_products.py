"""Products of queries and weights with what is stored, for numba's kernels.

Numbers, and codes of 8 and 4 bits, become float32 on their way into a product; rows are read as
:mod:`numba_lanes` can, the widest lanes first, and what is left by narrower ones. Four queries or
more of a latent meet its numbers in :mod:`numba_four_rows`. Letters: r rows (queries, and their
weights and values), n tokens, B blocks of D dimensions.
"""

from __future__ import annotations

from .numba_compiled import FAST, compiled
from .numba_four_rows import ROWS, add_rows, dots_of_rows, eight_of
from .numba_lanes import (
    WIDEST,
    added,
    as_number,
    eight_sums,
    high_lanes,
    keep,
    lanes,
    spread,
    wider,
)
from .numba_memory import fetch

try:
    import numba
    import numpy as np
    from numba.extending import overload
except ImportError as missing:
    raise ImportError("the package numba is not installed, or too old for numpy") from missing

TOGETHER = 8  # tokens that are added at a time
WIDENED_ONCE = ROWS  # queries of a latent from which on its numbers are written wide, once for all


@compiled(inline="always")
def _eight_places(t, n, row, first):
    """Return where the rows of eight tokens from ``t`` on begin; there are n."""
    last = n - 1
    return (
        min(t, last) * row + first, min(t + 1, last) * row + first,
        min(t + 2, last) * row + first, min(t + 3, last) * row + first,
        min(t + 4, last) * row + first, min(t + 5, last) * row + first,
        min(t + 6, last) * row + first, min(t + 7, last) * row + first,
    )  # fmt: skip


@compiled(fastmath=FAST, inline="always")
def _more_of_eight(sums, q, x, places, j, count):
    """Add to sums the products of numbers of a query with those of eight tokens."""
    a, b, c, d, e, f, g, h = sums
    m, n, o, p, r, s, t, u = places
    own = wider(lanes(q, j, count), WIDEST)
    a = added(own, wider(lanes(x, m + j, count), WIDEST), a)
    b = added(own, wider(lanes(x, n + j, count), WIDEST), b)
    c = added(own, wider(lanes(x, o + j, count), WIDEST), c)
    d = added(own, wider(lanes(x, p + j, count), WIDEST), d)
    e = added(own, wider(lanes(x, r + j, count), WIDEST), e)
    f = added(own, wider(lanes(x, s + j, count), WIDEST), f)
    g = added(own, wider(lanes(x, t + j, count), WIDEST), g)
    h = added(own, wider(lanes(x, u + j, count), WIDEST), h)
    return a, b, c, d, e, f, g, h


@compiled(fastmath=FAST, inline="always")
def _more_high_of_eight(sums, q, x, places, first, j, count):
    """Likewise with the high codes of bytes, which are the query's from ``first`` on."""
    a, b, c, d, e, f, g, h = sums
    m, n, o, p, r, s, t, u = places
    own = wider(lanes(q, first + j, count), WIDEST)
    a = added(own, wider(high_lanes(x, m + j, count), WIDEST), a)
    b = added(own, wider(high_lanes(x, n + j, count), WIDEST), b)
    c = added(own, wider(high_lanes(x, o + j, count), WIDEST), c)
    d = added(own, wider(high_lanes(x, p + j, count), WIDEST), d)
    e = added(own, wider(high_lanes(x, r + j, count), WIDEST), e)
    f = added(own, wider(high_lanes(x, s + j, count), WIDEST), f)
    g = added(own, wider(high_lanes(x, t + j, count), WIDEST), g)
    h = added(own, wider(high_lanes(x, u + j, count), WIDEST), h)
    return a, b, c, d, e, f, g, h


@compiled(fastmath=FAST)
def _dots(q, x, ahead, block, out):
    """Write the products [n] of a query [D] with a block of levels [n, B, D].

    Up to seven numbers behind n may be written, too.
    """
    n, size, row = x.shape[0], x.shape[2], x.shape[1] * x.shape[2]
    wide, eight, four = size // WIDEST * WIDEST, size // 8 * 8, size // 4 * 4
    x, zero = x.reshape(x.size), np.float32(0)
    for t in range(0, n, 8):
        fetch(ahead, t, 8)
        places = _eight_places(t, n, row, block * size)
        sums = eight_of(spread(zero, WIDEST))
        for j in range(0, wide, WIDEST):
            sums = _more_of_eight(sums, q, x, places, j, WIDEST)
        if eight > wide:
            sums = _more_of_eight(sums, q, x, places, wide, 8)
        if four > eight:
            sums = _more_of_eight(sums, q, x, places, eight, 4)
        keep(out, t, eight_sums(sums), 8)
        for j in range(four, size):
            for k in range(8):
                out[t + k] += q[j] * as_number(x[places[k] + j])


@compiled(fastmath=FAST)
def _dots_of_halves(q, x, ahead, out):
    """Write the products [n] of a query [D] with codes of 4 bits, two in a byte [n, 1, D / 2]."""
    n, row, zero = x.shape[0], x.shape[2], np.float32(0)
    wide, eight, four = row // WIDEST * WIDEST, row // 8 * 8, row // 4 * 4
    x = x.reshape(x.size)
    for t in range(0, n, 8):
        fetch(ahead, t, 8)
        places = _eight_places(t, n, row, 0)
        sums = eight_of(spread(zero, WIDEST))
        for j in range(0, wide, WIDEST):
            sums = _more_of_eight(sums, q, x, places, j, WIDEST)
            sums = _more_high_of_eight(sums, q, x, places, row, j, WIDEST)
        if eight > wide:
            sums = _more_of_eight(sums, q, x, places, wide, 8)
            sums = _more_high_of_eight(sums, q, x, places, row, wide, 8)
        if four > eight:
            sums = _more_of_eight(sums, q, x, places, eight, 4)
            sums = _more_high_of_eight(sums, q, x, places, row, eight, 4)
        keep(out, t, eight_sums(sums), 8)
        for j in range(four, row):
            for k in range(8):
                out[t + k] += q[j] * lanes(x, places[k] + j, 1)
                out[t + k] += q[row + j] * high_lanes(x, places[k] + j, 1)


@compiled(fastmath=FAST, inline="always")
def _add_some(out, w, x, first, row, start, stop, j, count):
    """Add to out some tokens' numbers from ``j`` on times weights."""
    sums = lanes(out, j, count)
    for t in range(start, stop):
        sums = added(spread(w[t], count), lanes(x, first + t * row + j, count), sums)
    keep(out, j, sums, count)


@compiled(fastmath=FAST)
def _add(out, w, x, ahead, block):
    """Add to out [D] a block of levels [n, B, D] times weights [n]."""
    n, size, row = x.shape[0], x.shape[2], x.shape[1] * x.shape[2]
    wide, eight, first = size // WIDEST * WIDEST, size // 8 * 8, block * size
    x = x.reshape(x.size)
    for t in range(0, n, TOGETHER):
        stop = min(t + TOGETHER, n)
        fetch(ahead, t, TOGETHER)
        for j in range(0, wide, WIDEST):
            _add_some(out, w, x, first, row, t, stop, j, WIDEST)
        if eight > wide:
            _add_some(out, w, x, first, row, t, stop, wide, 8)
        for j in range(eight, size):
            _add_some(out, w, x, first, row, t, stop, j, 1)


@compiled(fastmath=FAST, inline="always")
def _add_some_halves(out, w, x, start, stop, columns, j, count):
    """Add to out the bytes j of some tokens' codes times weights."""
    low, high = lanes(out, j, count), lanes(out, columns + j, count)
    for t in range(start, stop):
        own = spread(w[t], count)
        low = added(own, lanes(x, t * columns + j, count), low)
        high = added(own, high_lanes(x, t * columns + j, count), high)
    keep(out, j, low, count)
    keep(out, columns + j, high, count)


@compiled(fastmath=FAST)
def _add_halves(out, w, x, ahead):
    """Add to out [D] codes of 4 bits, two in a byte [n, 1, D / 2], times weights [n]."""
    n, columns = x.shape[0], x.shape[2]
    wide, eight, four = columns // WIDEST * WIDEST, columns // 8 * 8, columns // 4 * 4
    x = x.reshape(x.size)
    for t in range(0, n, TOGETHER):
        stop = min(t + TOGETHER, n)
        fetch(ahead, t, TOGETHER)
        for j in range(0, wide, WIDEST):
            _add_some_halves(out, w, x, t, stop, columns, j, WIDEST)
        if eight > wide:
            _add_some_halves(out, w, x, t, stop, columns, wide, 8)
        if four > eight:
            _add_some_halves(out, w, x, t, stop, columns, eight, 4)
        for j in range(four, columns):
            _add_some_halves(out, w, x, t, stop, columns, j, 1)


@compiled(fastmath=FAST)
def _dots_of_numbers(q, x, block, out):
    """Write the products [n] of a query [D] with a block of float32 numbers [n, B, D].

    They come one token behind the other: memory sees by itself what is read next.
    """
    whole = x.shape[0] // 2 * 2
    for t in range(0, whole, 2):
        one = two = np.float32(0)
        for j in range(x.shape[2]):
            one += q[j] * x[t, block, j]
            two += q[j] * x[t + 1, block, j]
        out[t], out[t + 1] = one, two
    for t in range(whole, x.shape[0]):
        total = np.float32(0)
        for j in range(x.shape[2]):
            total += q[j] * x[t, block, j]
        out[t] = total


@compiled(fastmath=FAST)
def _add_numbers(out, w, x, block):
    """Add to out [D] a block of float32 numbers [n, B, D] times weights [n]."""
    whole = x.shape[0] // TOGETHER * TOGETHER
    for t in range(0, whole, TOGETHER):
        a, b, c, d = w[t], w[t + 1], w[t + 2], w[t + 3]
        e, f, g, h = w[t + 4], w[t + 5], w[t + 6], w[t + 7]
        for j in range(out.shape[0]):
            out[j] += (
                a * x[t, block, j] + b * x[t + 1, block, j] + c * x[t + 2, block, j]
                + d * x[t + 3, block, j]
            ) + (
                e * x[t + 4, block, j] + f * x[t + 5, block, j] + g * x[t + 6, block, j]
                + h * x[t + 7, block, j]
            )  # fmt: skip
    for t in range(whole, x.shape[0]):
        for j in range(out.shape[0]):
            out[j] += w[t] * x[t, block, j]


@compiled(fastmath=FAST)
def _dots_of_each(query, x, ahead, block, out):
    for r in range(query.shape[0]):
        _dots(query[r], x, ahead, block, out[r])


@compiled(fastmath=FAST)
def _add_each(sums, weights, first, x, ahead, block):
    for r in range(sums.shape[0]):
        _add(sums[r, block], weights[r, first:], x, ahead, block)


@compiled(fastmath=FAST)
def _dots_with_levels(query, x, ahead, block, out):
    if query.shape[0] < ROWS:
        for r in range(query.shape[0]):
            _dots_of_numbers(query[r], x, block, out[r])
    else:
        dots_of_rows(query, x, ahead, block, out)


@compiled(fastmath=FAST)
def _add_levels(sums, weights, first, x, ahead, block):
    whole = sums.shape[0] // ROWS * ROWS
    add_rows(sums[:whole], weights, first, x, ahead, block)
    for r in range(whole, sums.shape[0]):
        _add_numbers(sums[r, block], weights[r, first:], x, block)


@compiled(fastmath=FAST)
def _dots_with_halves(query, x, ahead, out):
    for r in range(query.shape[0]):
        _dots_of_halves(query[r], x, ahead, out[r])


@compiled(fastmath=FAST)
def _add_halves_of_each(sums, weights, first, x, ahead):
    for r in range(sums.shape[0]):
        _add_halves(sums[r, 0], weights[r, first:], x, ahead)


def dots(query, x, ahead, block, out):
    """Write the products [r, n] of queries [r, D] with a block of what is stored; in kernels.

    Args:
        query: float32 [r, D].
        x: what is stored [n, B, D].
        ahead: what memory is asked for as tokens go by, see :func:`numba_memory.fetch`.
        block: number of the block.
        out: float32 [r, n and 7 more, or 0 more if that is a multiple of 8].
    """


def add_weighted(sums, weights, first, x, ahead, block):
    """Add to sums [r, B, D] a block of what is stored times weights [r, n] from ``first`` on."""


@overload(dots, inline="always")
def _chosen_dots(query, x, ahead, block, out):
    if x.dtype == numba.float32:
        return lambda query, x, ahead, block, out: _dots_with_levels(query, x, ahead, block, out)
    if x.dtype == numba.int8:
        return lambda query, x, ahead, block, out: _dots_with_halves(query, x, ahead, out)
    return lambda query, x, ahead, block, out: _dots_of_each(query, x, ahead, block, out)


@overload(add_weighted, inline="always")
def _chosen_weighted(sums, weights, first, x, ahead, block):
    if x.dtype == numba.float32:
        return lambda sums, weights, first, x, ahead, block: _add_levels(
            sums, weights, first, x, ahead, block
        )
    if x.dtype == numba.int8:
        return lambda sums, weights, first, x, ahead, block: _add_halves_of_each(
            sums, weights, first, x, ahead
        )
    return lambda sums, weights, first, x, ahead, block: _add_each(
        sums, weights, first, x, ahead, block
    )
