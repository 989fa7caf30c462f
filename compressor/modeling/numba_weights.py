"""Weights of scores, and averages of values, for numba's kernels.

Weights are powers of two relative to a mark, the highest score so far, and so are the sums of
values times them and their norm: both are scaled where the mark rises, and where what units of work
left is joined. Letters: r rows (queries of a group), n tokens, v width of values.
"""

from __future__ import annotations

from .numba_compiled import FAST, compiled

try:
    import numpy as np
except ImportError as missing:
    raise ImportError("the package numpy is not installed") from missing

LOWEST = np.float32(-1e30)  # of what is not attended to: finite, so that differences are numbers
NOTHING = np.float32(-5e29)  # above that and below any score
SMALLEST = np.float32(-126.0)
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
def weigh(scores, n, marks, sums, room):
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
