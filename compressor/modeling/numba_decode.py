"""Decoding on a CPU with numba: what the kernels are given, and how work is split.

A sequence is a few spans of tokens, :mod:`decode_spans`. A span is split among threads, and what
they leave is joined. Shapes: b sequences, h query heads, g latents of a part, s tokens, k and v
widths, r queries of a group.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from .decode_spans import PartTokens, Span, exact, spans_of
from .decode_tiles import EXACT
from .numba_compiled import said_if_slow
from .numba_kernels import LOWEST, MOST_THREADS, attend, join, room_for, threads
from .numba_part import (
    BFLOAT16,
    BITS,
    BLOCKS,
    CHANNEL_FORM,
    CODES,
    CODES_G,
    FIELDS,
    FIRST,
    FLOAT16,
    FLOAT32,
    FORM,
    LATENTS,
    NORMAL_FORM,
    ROW,
    SCALE,
    SCALE_G,
    TOKEN_FORM,
    TOKENS,
    WIDTH,
    ZERO,
    ZERO_G,
)
from .packed_latents import PackedLatents
from .quantizer_normal import CUBICS
from .schemes import NORMAL, PER_CHANNEL, PER_TOKEN, SCHEMES

WORTH = 2**20  # numbers of latents from which on a kernel is worth loading, or compiling
WORTH_PACKED = 2**18  # likewise of packed ones, which torch reads by some thirty operations
NUMBERS, MOST = 2**16, 2048  # that are unpacked at a time, and tokens: long runs of memory
PARTS = 3  # at most; as many for all, so that a kernel is compiled once
DTYPES = {
    torch.float32: FLOAT32,
    torch.bfloat16: BFLOAT16,
    torch.float16: FLOAT16,
}
FORMS = {PER_TOKEN.name: TOKEN_FORM, NORMAL.name: NORMAL_FORM, PER_CHANNEL.name: CHANNEL_FORM}
NOTHING = {
    dtype: torch.empty(0, dtype=dtype).numpy()
    for dtype in (torch.float32, torch.uint16, torch.uint8)
}
NO_MASK = np.empty((0, 0, 0), np.float32)
_turn = threading.Lock()  # not every way in which numba runs threads can be entered twice
_entered: list[int] = []  # the process that did: one forked from it ends when it enters too


def attend_packed(
    query: Tensor, key: PackedLatents, value: PackedLatents, mask: Tensor | None, scaling: float
) -> Tensor | None:
    """Attend over packed latents as :func:`decode` does; None where it cannot, or need not."""
    parts = (*key.parts, *value.parts)
    of_token = query.shape[0] * sum(part.exact.shape[1] * part.width for part in parts)
    worth = key.tokens * of_token >= WORTH_PACKED
    if not (worth and can_decode(query, [part.exact.dtype for part in parts])):
        return None
    return decode(query, spans_of(key, value), mask, scaling)


def attend_exact(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float
) -> Tensor | None:
    """Attend over latents [b, g, s, width] as :func:`decode` does; None as above."""
    worth = key.numel() + value.numel() >= WORTH
    if not (worth and can_decode(query, [key.dtype, value.dtype])):
        return None
    return decode(query, [Span(0, key.shape[2], (exact(key),), exact(value))], mask, scaling)


def can_decode(query: Tensor, dtypes: Sequence[torch.dtype]) -> bool:
    """Whether :func:`decode` knows a case.

    Args:
        query: one query, whose gradient nobody wants.
        dtypes: of the numbers that are not packed.
    """
    return (
        query.shape[2] == 1
        and all(dtype in DTYPES for dtype in (query.dtype, *dtypes))
        and not (query.requires_grad and torch.is_grad_enabled())
        and _entered in ([], [os.getpid()])
    )


def decode(query: Tensor, spans: Sequence[Span], mask: Tensor | None, scaling: float) -> Tensor:
    """Attend with one query for each sequence.

    Args:
        query: [b, h, 1, k].
        spans: all tokens; what a sequence has of each part is in few tensors.
        mask: None, or boolean (True attends) or additive, broadcastable to [b, h, 1, s].
        scaling: factor of the scores.

    Returns:
        The output [b, h, 1, v] in the query's dtype; 0 where nothing may be attended to.
    """
    b, h = query.shape[:2]
    queries = query.detach().float().reshape(b, -1).numpy() * np.float32(
        scaling * math.log2(math.e)
    )
    spans = [span for span in spans if span.tokens]
    groups = min(part.codes.shape[1] for part in spans[0].parts)
    count = min(torch.get_num_threads(), MOST_THREADS)
    _entered[:] = [os.getpid()]
    kind = {(part.form, part.bits, part.codes.dtype) for span in spans for part in span.parts}
    with _turn, _torch_threads_kept(), threads(count), said_if_slow(frozenset(kind)):
        left = [
            _attended(queries, span, groups, h // groups, count, _added(mask, span))
            for span in spans
        ]
    sums, marks = (x[0] if len(x) == 1 else np.concatenate(x, 2) for x in zip(*left, strict=True))
    out = np.empty((b, groups, h // groups, spans[0].values.width), np.float32)
    join(sums, marks, out)
    return torch.from_numpy(out).view(b, h, 1, -1).to(query.dtype)


@contextmanager
def _torch_threads_kept() -> Iterator[None]:
    """Give torch its number of threads back: numba, as it starts, sets one for each processor."""
    had = torch.get_num_threads()
    try:
        yield
    finally:
        if torch.get_num_threads() != had:
            torch.set_num_threads(had)


def _added(mask: Tensor | None, span: Span) -> np.ndarray:
    """Return what is added to scores in the logarithm to base 2, [b or 1, h or 1, tokens]."""
    if mask is None:
        return NO_MASK
    own = mask[:, :, 0, span.start : span.start + span.tokens]
    lowest = float(LOWEST)
    if own.dtype == torch.bool:
        return torch.zeros(own.shape).masked_fill_(~own, lowest).numpy()
    return (own.float() * math.log2(math.e)).clamp_min(lowest).contiguous().numpy()


def _attended(  # noqa: PLR0917
    queries: np.ndarray, span: Span, groups: int, rows: int, count: int, mask: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the sums [b, groups, splits, r * v] and marks [b, groups, splits, 2 * r] of a span."""
    b, widest = len(queries), max(part.width for part in span.parts)
    share = _whole(-(-span.tokens // (count // math.gcd(count, b * groups))))
    step = min(share, MOST, max(NUMBERS // widest // TOKENS, 1) * TOKENS)
    splits = -(-span.tokens // share)
    sums = np.empty((b, groups, splits, rows * span.values.width), np.float32)
    marks = np.empty((b, groups, splits, 2 * rows), np.float32)
    room = _room(count, room_for(step, widest))
    parts = (*span.keys, *(None,) * (PARTS - len(span.parts)), span.values)
    attend(
        queries,
        _table(parts, groups),
        np.array([_curve(part) for part in parts], np.float32),
        *(
            tuple(_memory(part and part.codes, dtype) for part in parts)
            for dtype in (torch.float32, torch.uint16, torch.uint8)
        ),
        tuple(_memory(part and part.scale, torch.uint16) for part in parts),
        tuple(_memory(part and part.zero, torch.uint8) for part in parts),
        mask,
        groups,
        span.tokens,
        share,
        step,
        sums,
        marks,
        room,
        room.view(np.uint32),
    )
    return sums, marks


@lru_cache(maxsize=8)
def _room(count: int, size: int) -> np.ndarray:
    """Return room for each thread; whoever has the turn may use it. Fresh memory is slow."""
    return np.empty((count, size), np.float32)


def _whole(tokens: int) -> int:
    """Return the least number of tokens, whole blocks of every scheme, that is not below."""
    return -(-tokens // TOKENS) * TOKENS


def _table(parts: Sequence[PartTokens | None], groups: int) -> np.ndarray:
    """Return what the kernels call the fields of each part; those of None are 0."""
    table = np.zeros((len(parts), len(FIELDS)), np.int64)
    first = 0
    for row, part in zip(table, parts, strict=True):
        if part is not None:
            codes, packed = part.codes, part.form != EXACT
            row[FORM] = FORMS[part.form] if packed else DTYPES[codes.dtype]
            row[BITS], row[WIDTH], row[FIRST] = part.bits, part.width, first
            row[LATENTS] = codes.shape[1] // groups
            row[ROW] = codes.shape[3]
            row[CODES : CODES_G + 1] = _place(codes, part.first)
            if part.scale is not None:
                block = part.first // SCHEMES[part.form].token_block
                row[BLOCKS] = part.scale.shape[3]
                row[SCALE : SCALE_G + 1] = _place(part.scale, block)
                if part.zero is not None:
                    row[ZERO : ZERO_G + 1] = _place(part.zero, block)
            first += part.width
    return table


def _place(x: Tensor, first: int) -> tuple[int, int, int]:
    """Return where in its memory the first token wanted of [b, g, s, n] is, and two strides."""
    start = int(x.storage_offset()) + first * x.shape[3]
    return start, x.stride(0), x.stride(1)


def _curve(part: PartTokens | None) -> tuple[float, float]:
    return CUBICS[part.bits] if part is not None and part.form == NORMAL.name else (0.0, 0.0)


def _memory(x: Tensor | None, dtype: torch.dtype) -> np.ndarray:
    """Return all memory that a tensor is in, if its numbers are as large as those of a dtype."""
    if x is None or x.element_size() != dtype.itemsize:
        return NOTHING[dtype]
    whole: np.ndarray = torch.empty(0, dtype=dtype).set_(x.untyped_storage()).numpy()
    return whole
