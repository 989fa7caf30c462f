"""Decoding on a CPU with numba: what the kernels are given, and how work is split.

A sequence is a few spans of tokens, :mod:`decode_spans`. A span is split among threads, and what
they leave is joined. Shapes: b sequences, h query heads, g latents of a part, s tokens, k and v
widths, r queries of a group.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .decode_spans import PartTokens, Span, exact, spans_of
from .decode_tiles import EXACT
from .numba_compiled import said_if_slow
from .numba_kernels import MOST_THREADS, attend, room_for
from .numba_part import (
    BFLOAT16,
    CHANNEL_FORM,
    FIELDS,
    FLOAT16,
    FLOAT32,
    NORMAL_FORM,
    TOKEN_FORM,
    TOKENS,
)
from .numba_tiles import allowed
from .numba_weights import LOWEST
from .packed_latents import PackedLatents
from .schemes import NORMAL, PER_CHANNEL, PER_TOKEN, SCHEMES

try:
    import numba
except ImportError as missing:
    raise ImportError("the package numba is not installed, or too old for numpy") from missing

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
NOTHING = (0,) * len(FIELDS)
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
    spans = [span for span in spans if span.tokens]
    groups = min(part.codes.shape[1] for part in spans[0].parts)
    count = min(torch.get_num_threads(), MOST_THREADS)
    widest = max(part.width for span in spans for part in span.parts)
    longest = _whole(max(span.tokens for span in spans))
    step = min(longest, MOST, max(NUMBERS // widest // TOKENS, 1) * TOKENS)
    numbers = query.detach().contiguous()
    tiles = query.dtype != torch.float32 and allowed()  # these hold what such a query has
    out = torch.empty(b, h, 1, spans[0].values.width)
    table = np.array([_rows(span, groups) for span in spans], np.int64)
    with _turn:
        given = (
            (numbers.data_ptr(), DTYPES[numbers.dtype], np.float32(scaling * math.log2(math.e))),
            (out.data_ptr(), b, groups, h // groups),
            (table, _added(mask), _room(count, room_for(step, widest))),
            (count // math.gcd(count, b * groups), step, tiles),
        )
        if _entered and numba.get_num_threads() == count:
            attend(*given)  # whatever is done around a call takes longer than a small cache
        else:
            _set_and_attend(count, given)
    return out.to(query.dtype)


def _set_and_attend(count: int, given: tuple[Any, ...]) -> None:
    """Attend on so many threads.

    Numba, as it starts, sets torch's number of threads to that of processors; torch gets it back.
    """
    of_torch, before = torch.get_num_threads(), numba.get_num_threads()
    _entered[:] = [os.getpid()]
    numba.set_num_threads(count)
    try:
        with said_if_slow(attend):
            attend(*given)
    finally:
        numba.set_num_threads(before)
        if torch.get_num_threads() != of_torch:
            torch.set_num_threads(of_torch)


def _added(mask: Tensor | None) -> np.ndarray:
    """Return what is added to scores in the logarithm to base 2, [b or 1, h or 1, s]."""
    if mask is None:
        return NO_MASK
    own, lowest = mask[:, :, 0], float(LOWEST)
    if own.dtype == torch.bool:
        return torch.zeros(own.shape).masked_fill_(~own, lowest).numpy()
    return (own.float() * math.log2(math.e)).clamp_min(lowest).contiguous().numpy()


def _whole(tokens: int) -> int:
    """Return the least number of tokens, whole blocks of every scheme, that is not below."""
    return -(-tokens // TOKENS) * TOKENS


@lru_cache(maxsize=8)
def _room(count: int, size: int) -> np.ndarray:
    """Return room for each thread; whoever has the turn may use it. Fresh memory is slow."""
    return np.empty((count, size), np.float32)


def _rows(span: Span, groups: int) -> list[tuple[int, ...]]:
    """Return what kernels call the fields of each part of a span; those of no part are 0."""
    found, first = [], 0
    for part in span.parts:
        found.append((span.start, span.tokens, *_row(part, first, groups)))
        first += part.width
    return [*found[:-1], *(NOTHING,) * (PARTS - len(found)), found[-1]]


def _row(part: PartTokens, first: int, groups: int) -> tuple[int, ...]:
    """Return the fields of a part, after its span's, whose keys meet a query's from ``first``."""
    codes, packed = part.codes, part.form != EXACT
    form = FORMS[part.form] if packed else DTYPES[codes.dtype]
    row, at, of_b, of_g = _place(codes, part.first)
    blocks, scales, zeros = 0, (0, 0, 0), (0, 0, 0)
    if part.scale is not None:
        block = part.first // SCHEMES[part.form].token_block
        blocks = part.scale.shape[3]
        _, *scales = _place(part.scale, block)
        if part.zero is not None:
            _, *zeros = _place(part.zero, block)
    latents = codes.shape[1] // groups
    return (
        form, part.bits, part.width, latents, first, blocks, row, at, of_b, of_g, *scales, *zeros,
    )  # fmt: skip


def _place(x: Tensor, first: int) -> tuple[int, int, int, int]:
    """Return the bytes of a row, where row ``first`` of [b, g, s, n] is, and two strides."""
    size = x.element_size()
    row, (of_b, of_g, _, _) = size * x.shape[3], x.stride()
    return row, x.data_ptr() + first * row, size * of_b, size * of_g
