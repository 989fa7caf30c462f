"""Products of queries and weights with bfloat16 numbers in tiles, for numba's kernels.

Queries and weights are float32. Each becomes two bfloat16 numbers whose sum it is but for 2e-5 of
itself: 8 rows are 16 of a tile. Whoever calls :func:`dots_by_tiles` and :func:`add_by_tiles` has
entered the tiles. Letters: r rows (queries that share a latent), n tokens, B blocks of D
dimensions.
"""

from __future__ import annotations

from .numba_compiled import FAST, compiled
from .numba_memory import fetch, numbers_at
from .numba_tiles import (
    LEFT,
    LEFT_END,
    LINE,
    PAIRS,
    RIGHT,
    RIGHT_END,
    ROWS,
    clear_tile,
    keep_pairs_of,
    keep_parts,
    keep_turned,
    lines,
    load_tile,
    multiply,
    store_tile,
)

try:
    import numpy as np
except ImportError as missing:
    raise ImportError("the package numpy is not installed") from missing

TOGETHER = ROWS // 2  # queries that tiles meet at a time
SUMS = 4  # tiles that hold sums
WIDE = SUMS * ROWS  # tokens, or dimensions, that these are of
TILE = ROWS * PAIRS  # numbers of a tile
NEAR = 64  # tokens whose values are laid out at a time: they stay in a processor's nearest memory


@compiled()
def clear(x):
    """Write zeros; numba's own way to do so to a slice is slow."""
    for k in range(x.shape[0]):
        x[k] = 0


@compiled()
def tiles_of(rows, size):
    """Return how many numbers :func:`lay_out` writes of so many queries of a size."""
    return -(-rows // TOGETHER) * -(-size // PAIRS) * TILE


@compiled()
def _two_parts(x, first, count, high, low):
    """Write numbers from ``x[first]`` on as two bfloat16 ones each, to two addresses."""
    whole = count // ROWS * ROWS
    for j in range(0, whole, ROWS):
        keep_parts(x, first + j, high + 2 * j, low + 2 * j, ROWS)
    for j in range(whole, count):
        keep_parts(x, first + j, high + 2 * j, low + 2 * j, 1)


@compiled()
def lay_out(queries, size, to):
    """Write queries [r * D] as tiles: of eight at a time, 32 dimensions after each other."""
    rows, i = queries.shape[0] // size, 0
    high, low = np.empty(size, np.uint16), np.empty(size, np.uint16)
    clear(to[: tiles_of(rows, size)])
    for start in range(0, rows, TOGETHER):
        for r in range(start, min(start + TOGETHER, rows)):
            _two_parts(queries, r * size, size, high.ctypes.data, low.ctypes.data)
            for j in range(size):
                place = i + j // PAIRS * TILE + j % PAIRS // 2 * PAIRS + 2 * (r - start) + j % 2
                to[place], to[place + 2 * TOGETHER] = high[j], low[j]
        i += tiles_of(1, size)


@compiled(inline="always")
def _store_sums(to, stride, step):
    """Write the tiles of sums, ``step`` bytes from each other."""
    store_tile(0, to, stride)
    store_tile(1, to + step, stride)
    store_tile(2, to + 2 * step, stride)
    store_tile(3, to + 3 * step, stride)


@compiled(inline="always")
def _meet_rows(to, left, right, tokens, here, last, stride):
    """Add products with 16 tokens; of fewer, rows and zeros behind them are at ``last``."""
    if tokens > 0:
        load_tile(left, here if tokens >= ROWS else last, stride)
        multiply(to, left, right)


@compiled(inline="always")
def _meet_pairs(left, right, at, tokens, here, last, stride):
    """Add to the tiles of sums products of at most 64 tokens with queries that are at ``at``."""
    step = ROWS * stride
    load_tile(right, at, LINE)
    _meet_rows(0, left, right, tokens, here, last, stride)
    _meet_rows(1, left, right, tokens - ROWS, here + step, last, stride)
    _meet_rows(2, left, right, tokens - 2 * ROWS, here + 2 * step, last, stride)
    _meet_rows(3, left, right, tokens - 3 * ROWS, here + 3 * step, last, stride)


@compiled()
def _meet_tokens(at, size, tokens, here, last, stride, ahead, first, sums):
    """Write products [64, 2, 8] of queries with tokens; memory is asked for bit by bit."""
    whole, end = size // PAIRS, size % PAIRS
    share = -(-tokens // max(whole, 1))
    clear_tile(0)
    clear_tile(1)
    clear_tile(2)
    clear_tile(3)
    for k in range(whole):
        fetch(ahead, first + k * share, share)
        _meet_pairs(
            LEFT, RIGHT, at + k * 2 * TILE, tokens, here + k * LINE, last + k * LINE, stride
        )
    if end:
        far = whole * LINE
        _meet_pairs(
            LEFT_END, RIGHT_END, at + whole * 2 * TILE, tokens, here + far, last + far, stride
        )
    _store_sums(sums, LINE, ROWS * LINE)


@compiled(fastmath=FAST)
def dots_by_tiles(tiles, rows, x, ahead, block, out):
    """Write the products [r, n] of queries with a block of numbers [n, B, D].

    Args:
        tiles: uint16, the queries as :func:`lay_out` writes them.
        rows: how many they are.
        x: bfloat16 numbers as uint16; D is even.
        ahead: what memory is asked for as tokens go by, see :func:`numba_memory.fetch`.
        block: number of the block.
        out: float32 [r, n].
    """
    n, size = x.shape[0], x.shape[2]
    stride, first, rest = 2 * x.shape[1] * size, 2 * block * size, x.shape[0] % ROWS
    last = np.zeros((ROWS if rest else 0, x.shape[1], size), np.uint16)
    for t in range(rest):
        for j in range(size):
            last[t, block, j] = x[n - rest + t, block, j]
    sums, turned = lines(SUMS * TILE // 2), lines(SUMS * TILE // 4).view(np.float32)
    for t in range(0, n, WIDE):
        tokens = min(n - t, WIDE)
        for start in range(0, rows, TOGETHER):
            asked = (ahead[0], ahead[1] if start == 0 else 0)
            at = tiles.ctypes.data + 2 * start // TOGETHER * tiles_of(1, size)
            here = x.ctypes.data + t * stride + first
            _meet_tokens(
                at, size, tokens, here, last.ctypes.data + first, stride, asked, t, sums.ctypes.data
            )
            for s in range(SUMS):
                to = turned.ctypes.data + s * LINE
                keep_turned(sums.ctypes.data + s * 2 * TILE, to, SUMS * LINE)
            for r in range(min(TOGETHER, rows - start)):
                to, own = out[start + r, t : t + tokens], turned[r * WIDE :]
                for s in range(tokens):
                    to[s] = own[s]


@compiled()
def _pair_up(x, size, first, row, tokens, pairs, stride, to):
    """Write tokens, whose numbers [D] begin at ``x[first]`` and a row on, as so many pairs."""
    wide = size // PAIRS * PAIRS
    for p in range(pairs):
        one, at = first + 2 * p * row, to + p * stride
        if 2 * p + 1 < tokens:
            for j in range(0, wide, PAIRS):
                keep_pairs_of(x, one + j, one + row + j, at + 4 * j, PAIRS)
            for j in range(wide, size):
                keep_pairs_of(x, one + j, one + row + j, at + 4 * j, 1)
        else:
            own = numbers_at(at, size, np.uint32)
            for j in range(size):
                own[j] = np.uint32(x[one + j] if 2 * p < tokens else np.uint16(0))


@compiled()
def _lay_out_weights(weights, begin, tokens, to):
    """Write weights [r, n] from ``begin`` on, of eight rows at most, as tiles of 32 tokens each."""
    length = weights.shape[1]
    if tokens < NEAR or weights.shape[0] < TOGETHER:
        clear(to)
    weights, rows = weights.reshape(weights.size), weights.shape[0]
    for r in range(rows):
        for s in range(0, tokens, PAIRS):
            at = to.ctypes.data + s // PAIRS * 2 * TILE + r * LINE
            place, count = r * length + begin + s, min(PAIRS, tokens - s)
            _two_parts(weights, place, count, at, at + TOGETHER * LINE)


@compiled()
def _weigh_pairs(own, pairs, steps, ahead, first, share, to, stride):
    """Add to sums [16, D] weights, ``steps`` tiles, times pairs of tokens [n / 2, D]."""
    for j in range(0, stride, SUMS * LINE):
        here = to + j
        load_tile(0, here, stride)
        load_tile(1, here + LINE, stride)
        load_tile(2, here + 2 * LINE, stride)
        load_tile(3, here + 3 * LINE, stride)
        for s in range(steps):
            fetch(ahead, first, share)
            first += share
            load_tile(LEFT, own + s * 2 * TILE, LINE)
            at = pairs + s * ROWS * stride + j
            load_tile(RIGHT, at, stride)
            multiply(0, LEFT, RIGHT)
            load_tile(RIGHT, at + LINE, stride)
            multiply(1, LEFT, RIGHT)
            load_tile(RIGHT, at + 2 * LINE, stride)
            multiply(2, LEFT, RIGHT)
            load_tile(RIGHT, at + 3 * LINE, stride)
            multiply(3, LEFT, RIGHT)
        _store_sums(here, stride, LINE)


@compiled(fastmath=FAST)
def add_by_tiles(sums, weights, begin, x, ahead, block):
    """Add to sums [r, B, D] a block of numbers [n, B, D] times weights [r, n] from ``begin`` on."""
    rows, n, size = sums.shape[0], x.shape[0], x.shape[2]
    wide, eights = -(-size // WIDE) * WIDE, -(-rows // TOGETHER)
    pairs, own = lines(NEAR // 2 * wide), lines(NEAR // PAIRS * TILE // 2)
    found = lines(eights * ROWS * wide).view(np.float32)
    flat, row = x.reshape(x.size), x.shape[1] * size
    clear(found)
    if wide > size:
        clear(pairs)
    for t in range(0, n, NEAR):
        tokens = min(n - t, NEAR)
        steps = -(-tokens // PAIRS)
        share = -(-tokens * WIDE // (wide * steps))
        at = pairs.ctypes.data
        _pair_up(flat, size, t * row + block * size, row, tokens, steps * ROWS, 4 * wide, at)
        for start in range(0, rows, TOGETHER):
            _lay_out_weights(weights[start : min(start + TOGETHER, rows)], begin + t, tokens, own)
            asked = (ahead[0], ahead[1] if start == 0 else 0)
            here = found.ctypes.data + 8 * start * wide
            _weigh_pairs(own.ctypes.data, pairs.ctypes.data, steps, asked, t, share, here, 4 * wide)
    for r in range(rows):
        high, out = found[(r + r // TOGETHER * TOGETHER) * wide :], sums[r, block]
        low = high[TOGETHER * wide :]
        for j in range(size):
            out[j] += high[j] + low[j]
