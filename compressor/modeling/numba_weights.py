"""Weights of scores, and averages of values, for numba's kernels.

Weights are powers of two relative to a mark, the highest score so far, and so are the sums of
values times them and their norm: both are scaled where the mark rises, and where what units of work
left is joined. Letters: r rows (queries of a group), n tokens, v width of values.
"""

from __future__ import annotations

from .numba_compiled import FAST, compiled
from .numba_lanes import (
    WIDEST,
    added,
    higher,
    highest_of,
    keep,
    lanes,
    powers_of_two,
    spread,
    sum_of,
)

try:
    import numpy as np
except ImportError as missing:
    raise ImportError("the package numpy is not installed") from missing

LOWEST = np.float32(-1e30)  # of what is not attended to: finite, so that differences are numbers
NOTHING = np.float32(-5e29)  # above that and below any score
# 2 ** f for 0 <= f < 1 at Chebyshev's points: 2e-8 of it at most, below float32's own rounding.
_POWERS = np.polynomial.chebyshev.Chebyshev.interpolate(np.exp2, 6, [0, 1])
C = tuple(np.float32(c) for c in _POWERS.convert(kind=np.polynomial.Polynomial).coef)


@compiled()
def begin_scores(scores, mask, b, group, low, n):
    """Write to scores [r, n] what the mask adds to those of tokens from ``low`` on."""
    scores[:] = 0
    if mask.shape[0]:
        own = mask[min(b, mask.shape[0] - 1)]
        for r in range(scores.shape[0]):
            head = min(group * scores.shape[0] + r, own.shape[0] - 1)
            for t in range(n):
                scores[r, t] = own[head, low + t]


@compiled()
def _highest(x, mark):
    """Return the highest of numbers and a mark."""
    wide, top = x.shape[0] // WIDEST * WIDEST, spread(mark, WIDEST)
    for j in range(0, wide, WIDEST):
        top = higher(lanes(x, j, WIDEST), top)
    found = highest_of(top)
    for j in range(wide, x.shape[0]):
        found = higher(x[j], found)
    return found


@compiled(fastmath=FAST)
def _to_weights(x, top):
    """Write 2 ** (x - top) over x and return their sum."""
    n, less = x.shape[0], np.float32(-top)
    wide = n // WIDEST * WIDEST
    one, shift = spread(np.float32(1), WIDEST), spread(less, WIDEST)
    total = spread(np.float32(0), WIDEST)
    for j in range(0, wide, WIDEST):
        found = powers_of_two(added(one, lanes(x, j, WIDEST), shift), C)
        keep(x, j, found, WIDEST)
        total = added(one, found, total)
    norm = sum_of(total)
    for j in range(wide, n):
        x[j] = powers_of_two(np.float32(x[j] + less), C)
        norm += x[j]
    return norm


@compiled(fastmath=FAST)
def weigh(scores, n, marks, sums):
    """Make weights of n scores of each row, relative to the marks, which may rise."""
    rows, v = scores.shape[0], sums.shape[0] // scores.shape[0]
    for r in range(rows):
        own = scores[r, :n]
        top = _highest(own, marks[r])
        kept = np.float32(2.0) ** (marks[r] - top)
        marks[r] = top
        marks[rows + r] = marks[rows + r] * kept + _to_weights(own, top)
        if kept != 1:
            for j in range(r * v, (r + 1) * v):
                sums[j] *= kept


@compiled(fastmath=FAST)
def join(sums, marks, out):
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
