"""Products of four queries, or of their weights, with levels that these share.

Eight sums stay in registers while numbers go by, so that arithmetic, not memory, is the bound:
those of four queries with two tokens, or of four rows of values in two places. Letters: r rows
(queries, and their weights and values), n tokens, B blocks of D dimensions.
"""

from __future__ import annotations

from .numba_compiled import FAST, compiled
from .numba_lanes import WIDEST, add_pairs, added, eight_sums, keep, keep_pairs, lanes, spread
from .numba_memory import fetch

try:
    import numpy as np
except ImportError as missing:
    raise ImportError("the package numpy is not installed") from missing

ROWS = 4
NEAR = 16  # tokens whose levels stay near while all rows meet them


@compiled(inline="always")
def eight_of(x):
    """Return one value eight times."""
    return x, x, x, x, x, x, x, x


@compiled(fastmath=FAST, inline="always")
def _more_dots(sums, q, size, x, one, other, j, count):
    """Add products from dimension ``j`` on of queries [4, D] with two tokens."""
    a, b, c, d, e, f, g, h = sums
    first, second = lanes(x, one + j, count), lanes(x, other + j, count)
    own = lanes(q, j, count)
    a, b = added(own, first, a), added(own, second, b)
    own = lanes(q, size + j, count)
    c, d = added(own, first, c), added(own, second, d)
    own = lanes(q, 2 * size + j, count)
    e, f = added(own, first, e), added(own, second, f)
    own = lanes(q, 3 * size + j, count)
    g, h = added(own, first, g), added(own, second, h)
    return a, b, c, d, e, f, g, h


@compiled(fastmath=FAST)
def dots_of_rows(query, x, ahead, block, out):
    """Write the products [r, n] of at least four queries [r, D] with a block of levels [n, B, D].

    The last four queries may be some that were among others. What ``out`` has behind n, an even
    number of tokens, may be written to.
    """
    (rows, size), n, row, length = query.shape, x.shape[0], x.shape[1] * x.shape[2], out.shape[1]
    wide, narrow, zero = size // WIDEST * WIDEST, size // 8 * 8, np.float32(0)
    x, query, out = x.reshape(x.size), query.reshape(query.size), out.reshape(out.size)
    for t in range(0, n, 2):
        fetch(ahead, t, 2)
        one, other = t * row + block * size, min(t + 1, n - 1) * row + block * size
        for start in range(0, rows, ROWS):
            r = min(start, rows - ROWS)
            q, to = query[r * size :], r * length + t
            sums = eight_of(spread(zero, WIDEST))
            for j in range(0, wide, WIDEST):
                sums = _more_dots(sums, q, size, x, one, other, j, WIDEST)
            keep_pairs(out, to, length, eight_sums(sums))
            if narrow > wide:
                sums = _more_dots(eight_of(spread(zero, 8)), q, size, x, one, other, wide, 8)
                add_pairs(out, to, length, eight_sums(sums))
            for j in range(narrow, size):
                for s in range(ROWS):
                    own = q[s * size + j]
                    out[to + s * length] += own * x[one + j]
                    out[to + s * length + 1] += own * x[other + j]


@compiled(fastmath=FAST, inline="always")
def _add_place(where, j, count):
    """Add to four rows, from dimension ``j`` on, tokens times weights."""
    out, of_out, w, of_w, x, first, row, tokens = where
    a, b = lanes(out, j, count), lanes(out, of_out + j, count)
    c, d = lanes(out, 2 * of_out + j, count), lanes(out, 3 * of_out + j, count)
    for t in range(tokens):
        own = lanes(x, first + t * row + j, count)
        a = added(spread(w[t], count), own, a)
        b = added(spread(w[of_w + t], count), own, b)
        c = added(spread(w[2 * of_w + t], count), own, c)
        d = added(spread(w[3 * of_w + t], count), own, d)
    keep(out, j, a, count)
    keep(out, of_out + j, b, count)
    keep(out, 2 * of_out + j, c, count)
    keep(out, 3 * of_out + j, d, count)


@compiled(fastmath=FAST, inline="always")
def _add_two_places(where, j):
    """Likewise from ``j`` on in two places that follow each other."""
    out, of_out, w, of_w, x, first, row, tokens = where
    k = j + WIDEST
    a, b = lanes(out, j, WIDEST), lanes(out, k, WIDEST)
    c, d = lanes(out, of_out + j, WIDEST), lanes(out, of_out + k, WIDEST)
    e, f = lanes(out, 2 * of_out + j, WIDEST), lanes(out, 2 * of_out + k, WIDEST)
    g, h = lanes(out, 3 * of_out + j, WIDEST), lanes(out, 3 * of_out + k, WIDEST)
    for t in range(tokens):
        one, two = lanes(x, first + t * row + j, WIDEST), lanes(x, first + t * row + k, WIDEST)
        own = spread(w[t], WIDEST)
        a, b = added(own, one, a), added(own, two, b)
        own = spread(w[of_w + t], WIDEST)
        c, d = added(own, one, c), added(own, two, d)
        own = spread(w[2 * of_w + t], WIDEST)
        e, f = added(own, one, e), added(own, two, f)
        own = spread(w[3 * of_w + t], WIDEST)
        g, h = added(own, one, g), added(own, two, h)
    keep(out, j, a, WIDEST)
    keep(out, k, b, WIDEST)
    keep(out, of_out + j, c, WIDEST)
    keep(out, of_out + k, d, WIDEST)
    keep(out, 2 * of_out + j, e, WIDEST)
    keep(out, 2 * of_out + k, f, WIDEST)
    keep(out, 3 * of_out + j, g, WIDEST)
    keep(out, 3 * of_out + k, h, WIDEST)


@compiled(fastmath=FAST)
def add_rows(sums, weights, begin, x, ahead, block):
    """Add to sums [r, B, D] a block of levels [n, B, D] times weights [r, n] from ``begin`` on.

    There are whole fours of rows; more weights may follow.
    """
    n, size, row, of_w = x.shape[0], x.shape[2], x.shape[1] * x.shape[2], weights.shape[1]
    two, wide, narrow = size // (2 * WIDEST) * 2 * WIDEST, size // WIDEST * WIDEST, size // 8 * 8
    x, sums = x.reshape(x.size), sums.reshape(sums.size)
    weights = weights.reshape(weights.size)
    for start in range(0, n, NEAR):
        tokens, first = min(NEAR, n - start), start * row + block * size
        fetch(ahead, start, NEAR)
        for r in range(0, sums.size // row, ROWS):
            out, w = sums[r * row + block * size :], weights[r * of_w + begin + start :]
            where = (out, row, w, of_w, x, first, row, tokens)
            for j in range(0, two, 2 * WIDEST):
                _add_two_places(where, j)
            for j in range(two, wide, WIDEST):
                _add_place(where, j, WIDEST)
            for j in range(wide, narrow, 8):
                _add_place(where, j, 8)
            for j in range(narrow, size):
                _add_place(where, j, 1)
