"""Products of queries and weights with what is stored, for numba's kernels.

Numbers, and codes of 8 and 4 bits, become float32 on their way into a product; rows are read as
:mod:`numba_lanes` can. Letters: n tokens, B blocks of D dimensions.
"""

from __future__ import annotations

from .numba_compiled import FAST, compiled
from .numba_lanes import added, as_number, high_lanes, keep, lanes, spread, sum_of

try:
    import numba
    import numpy as np
    from numba.extending import overload
except ImportError as missing:
    raise ImportError("the package numba is not installed, or too old for numpy") from missing

TOGETHER = 8  # tokens that are added at a time


@compiled(fastmath=FAST)
def _dots(q, x, block, out):
    """Write the products [n] of a query [D] with a block of levels [n, B, D].

    Two are summed side by side, or each would wait for the end of the one before.
    """
    whole = x.shape[0] // 2 * 2
    for t in range(0, whole, 2):
        one = two = np.float32(0)
        for j in range(x.shape[2]):
            one += q[j] * as_number(x[t, block, j])
            two += q[j] * as_number(x[t + 1, block, j])
        out[t], out[t + 1] = one, two
    for t in range(whole, x.shape[0]):
        total = np.float32(0)
        for j in range(x.shape[2]):
            total += q[j] * as_number(x[t, block, j])
        out[t] = total


@compiled(fastmath=FAST)
def _four_dots(q, x, block, out):
    """Write the products [4, n] of queries [4, D] with a block of levels [n, B, D]."""
    a, b, c, d = q[0], q[1], q[2], q[3]
    for t in range(x.shape[0]):
        one = two = three = four = np.float32(0)
        for j in range(x.shape[2]):
            number = as_number(x[t, block, j])
            one += a[j] * number
            two += b[j] * number
            three += c[j] * number
            four += d[j] * number
        out[0, t], out[1, t], out[2, t], out[3, t] = one, two, three, four


@compiled(fastmath=FAST)
def _add(out, w, x, block):
    """Add to out [D] a block of levels [n, B, D] times weights [n]."""
    whole = x.shape[0] // TOGETHER * TOGETHER
    for t in range(0, whole, TOGETHER):
        a, b, c, d = w[t], w[t + 1], w[t + 2], w[t + 3]
        e, f, g, h = w[t + 4], w[t + 5], w[t + 6], w[t + 7]
        for j in range(out.shape[0]):
            out[j] += (
                a * as_number(x[t, block, j]) + b * as_number(x[t + 1, block, j])
                + c * as_number(x[t + 2, block, j]) + d * as_number(x[t + 3, block, j])
            ) + (
                e * as_number(x[t + 4, block, j]) + f * as_number(x[t + 5, block, j])
                + g * as_number(x[t + 6, block, j]) + h * as_number(x[t + 7, block, j])
            )  # fmt: skip
    for t in range(whole, x.shape[0]):
        for j in range(out.shape[0]):
            out[j] += w[t] * as_number(x[t, block, j])


@compiled(fastmath=FAST, inline="always")
def _two_more(a, b, q, x, one, other, columns, j, count):
    """Add to sums, side by side, the products of a query with bytes j of two tokens' codes."""
    own = lanes(q, j, count)
    a = added(own, lanes(x, one * columns + j, count), a)
    b = added(own, lanes(x, other * columns + j, count), b)
    own = lanes(q, columns + j, count)
    a = added(own, high_lanes(x, one * columns + j, count), a)
    b = added(own, high_lanes(x, other * columns + j, count), b)
    return a, b


@compiled(fastmath=FAST)
def _dots_of_halves(q, x, out):
    """Write the products [n] of a query [D] with codes of 4 bits, two in a byte [n, 1, D / 2]."""
    n, columns, nothing = x.shape[0], x.shape[2], np.float32(0)
    wide, half = columns // 8 * 8, columns // 4 * 4
    x = x.reshape(x.size)
    for t in range(0, n, 2):
        last = min(t + 1, n - 1)
        a = b = spread(nothing, 8)
        for j in range(0, wide, 8):
            a, b = _two_more(a, b, q, x, t, last, columns, j, 8)
        c = d = spread(nothing, 4)
        if half > wide:
            c, d = _two_more(c, d, q, x, t, last, columns, wide, 4)
        one, two = sum_of(a) + sum_of(c), sum_of(b) + sum_of(d)
        for j in range(half, columns):
            one, two = _two_more(one, two, q, x, t, last, columns, j, 1)
        out[t], out[last] = one, two


@compiled(fastmath=FAST, inline="always")
def _add_some(out, w, x, start, stop, columns, j, count):
    """Add to out the bytes j of some tokens' codes times weights."""
    low, high = lanes(out, j, count), lanes(out, columns + j, count)
    for t in range(start, stop):
        own = spread(w[t], count)
        low = added(own, lanes(x, t * columns + j, count), low)
        high = added(own, high_lanes(x, t * columns + j, count), high)
    keep(out, j, low, count)
    keep(out, columns + j, high, count)


@compiled(fastmath=FAST)
def _add_halves(out, w, x):
    """Add to out [D] codes of 4 bits, two in a byte [n, 1, D / 2], times weights [n]."""
    n, columns = x.shape[0], x.shape[2]
    wide, half = columns // 8 * 8, columns // 4 * 4
    x = x.reshape(x.size)
    for t in range(0, n, TOGETHER):
        stop = min(t + TOGETHER, n)
        for j in range(0, wide, 8):
            _add_some(out, w, x, t, stop, columns, j, 8)
        if half > wide:
            _add_some(out, w, x, t, stop, columns, wide, 4)
        for j in range(half, columns):
            _add_some(out, w, x, t, stop, columns, j, 1)


def products(q, x, block, out):
    """Write the products [n] of a query [D] with a block of what is stored; in kernels alone."""


def four_products(q, x, block, out):
    """Write the products [4, n] of queries [4, D] likewise."""


def weighted(out, w, x, block):
    """Add to out [D] a block of what is stored times weights [n]."""


@overload(products, inline="always")
def _chosen_products(q, x, block, out):
    if x.dtype == numba.int8:
        return lambda q, x, block, out: _dots_of_halves(q, x, out)
    return lambda q, x, block, out: _dots(q, x, block, out)


@overload(four_products, inline="always")
def _chosen_four_products(q, x, block, out):
    if x.dtype == numba.float32:
        return lambda q, x, block, out: _four_dots(q, x, block, out)
    return lambda q, x, block, out: None  # fewer read what is not float32: WIDENED_ONCE


@overload(weighted, inline="always")
def _chosen_weighted(out, w, x, block):
    if x.dtype == numba.int8:
        return lambda out, w, x, block: _add_halves(out, w, x)
    return lambda out, w, x, block: _add(out, w, x, block)
