"""The kernel of :mod:`numba_decode`: one query of each sequence attends over latents on a CPU.

A unit of work is some tokens of one sequence and one group of heads. It leaves the weighted sum of
its values beside its norm and the power of two that both are relative to, and these are joined.
Queries meet latents in :mod:`numba_latents`; scores become weights in :mod:`numba_weights`.
Letters: r rows (queries of a group), n tokens, k and v widths.
"""

from __future__ import annotations

from .numba_compiled import compiled
from .numba_latents import (
    SPARE,
    arrange,
    meet_latent,
    numbers_in_tiles,
    padded,
    put_in_order,
    room_for_levels,
)
from .numba_levels import runs_of, widen_bfloat16, widen_float16
from .numba_memory import numbers_at
from .numba_part import BFLOAT16, FLOAT32, LATENTS, SPAN_TOKENS, START, TOKENS, WIDTH
from .numba_weights import NOTHING, begin_scores, join, weigh

try:
    import numba
    import numpy as np
except ImportError as missing:
    raise ImportError("the package numba is not installed, or too old for numpy") from missing

MOST_THREADS: int = vars(numba.config)["NUMBA_NUM_THREADS"]


def room_for(step: int, widest: int) -> int:
    """Return how many numbers of room a thread needs: levels, then scales, then factors."""
    return room_for_levels(step, widest) + step + TOKENS * widest


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
def _attend_some(
    query, table, start, stop, mask, rows, b, group, step, tiles, sums, marks, room
):  # fmt: skip
    """Attend with queries [r * k] over some tokens of a span; sums [r * v], marks [2 * r]."""
    values, most, whole = table.shape[0] - 1, 0, 0
    for p in range(table.shape[0]):
        most = max(most, table[p, WIDTH])
        if table[p, WIDTH]:
            latents = table[p, LATENTS]
            whole = max(whole, latents * numbers_in_tiles(table[p], rows // latents, tiles))
    scale = room[room_for_levels(step, most) :]
    factors, zero = scale[step:], np.zeros(max(step, TOKENS * most), np.float32)
    scores, found = np.empty((rows, step), np.float32), np.empty((rows, step), np.float32)
    queries = np.empty((values, rows * (most + SPARE)), np.float32)
    in_tiles = np.empty((values, whole), np.uint16)
    for p in range(values):
        if table[p, WIDTH]:
            arrange(query, rows, table[p], tiles, queries[p], in_tiles[p])
    order = runs_of(table[values])
    held = np.empty(rows * padded(table[values]), np.float32) if order > 1 else sums
    held[:] = 0
    marks[:rows] = NOTHING
    marks[rows:] = 0
    for low in range(start, stop, step):
        n = min(step, stop - low)
        begin_scores(scores, mask, b, group, table[values, START] + low, n)
        for p in range(values + 1):
            part, latents, is_value = table[p], table[p, LATENTS], p == values
            if part[WIDTH] == 0:
                continue
            if is_value:
                weigh(scores, n, marks, held)
            shared, asks = rows // latents, min(p, values - 1)
            size, whole = shared * padded(part), numbers_in_tiles(part, shared, tiles)
            for latent in range(latents):
                first = latent * shared
                meet_latent(
                    part, b, group * latents + latent, low, n, is_value, tiles,
                    queries[asks, latent * size :], in_tiles[asks, latent * whole :],
                    scores[first : first + shared],
                    held[latent * size : (latent + 1) * size] if is_value else held, room, factors,
                    scale, zero, found,
                )  # fmt: skip
    if order > 1:
        put_in_order(held, order, sums, rows)


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
        work: pieces in which each span is cut, one of which for one group is a unit of work, tokens
            that are unpacked at a time, and whether tiles may be used.
    """
    address, form, factor = query
    to, batch, groups, rows = out
    table, mask, room = read
    pieces, step, tiles = work
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
                rows, pair // groups, pair % groups, step, tiles, sums[pair, piece, s],
                marks[pair, piece, s], room[numba.get_thread_id()],
            )  # fmt: skip
    for pair in range(pairs):
        left = sums[pair].reshape(pieces * spans, rows * v)
        found = numbers_at(to + pair * rows * v * 4, rows * v, np.float32).reshape(rows, v)
        join(left, marks[pair].reshape(pieces * spans, 2 * rows), found)
