"""What scales and zero points make of products with levels, for numba's kernels.

As in :mod:`packed_products`, they are taken out of the products: scores are scaled behind these,
and values by their weights in front of them. Letters: r rows (queries that share a latent), n
tokens, B blocks of D dimensions that share a scale.
"""

from __future__ import annotations

from .numba_compiled import FAST, compiled

try:
    import numpy as np
except ImportError as missing:
    raise ImportError("the package numpy is not installed") from missing


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
def take_products(scores, first, query, n, scaled, scales, zeros, found):
    """Add to scores [r, n], from ``first`` on, what products [r, n] with queries [r, D] mean."""
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
def weights_of_levels(weights, first, n, scales, zeros, own):
    """Write weights [r, n], from ``first`` on, times scales; return what zero points take [r]."""
    lost = np.empty(weights.shape[0], np.float32)
    for r in range(weights.shape[0]):
        lost[r] = _scaled(weights[r, first : first + n], n, scales, zeros, own[r])
    return lost


@compiled(fastmath=FAST)
def take_lost(sums, block, lost):
    """Take from sums [r, B, D] of a block what zero points take."""
    for r in range(sums.shape[0]):
        out = sums[r, block]
        for j in range(out.shape[0]):
            out[j] -= lost[r]
