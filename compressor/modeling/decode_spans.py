"""What a decode kernel reads: spans of tokens in which each part has one form.

Which spans there are depends on the layout alone, so that a kernel is compiled once; each may be
empty. Shapes: b sequences, g latents of a part, s tokens.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from .decode_tiles import EXACT
from .packed_latents import PackedLatents, StoredPart

HALVES = (torch.float16, torch.bfloat16)  # what the kernel on CUDA reads of numbers


class PartTokens(NamedTuple):
    """Tokens of one part in one form.

    Attributes:
        codes: numbers [b, g, s, width] or packed codes [b, g, s, bytes]; a latent's tokens lie
            behind each other without a gap.
        scale: [b, g, s / token_block, blocks], None for numbers.
        zero: likewise, None where a scheme has none.
        form: ``exact`` or the name of a scheme.
        bits: of a number.
        width: numbers per latent.
        first: the first token wanted.
        moved: whether ``first`` may be another than 0.
    """

    codes: Tensor
    scale: Tensor | None
    zero: Tensor | None
    form: str
    bits: int
    width: int
    first: int = 0
    moved: bool = False


class Span(NamedTuple):
    """Tokens that follow each other, and the form of each part of them.

    Attributes:
        start: number of the first one in the sequence.
        tokens: how many; there may be none.
        keys: the parts of the keys.
        values: the values.
    """

    start: int
    tokens: int
    keys: tuple[PartTokens, ...]
    values: PartTokens

    @property
    def parts(self) -> tuple[PartTokens, ...]:
        """All parts, as a kernel takes them."""
        return (*self.keys, self.values)


def exact(x: Tensor, first: int = 0, *, moved: bool = False) -> PartTokens:
    """Return tokens that are stored as they are, ``x`` [b, g, s, width]."""
    dense = x.stride(3) == 1 and (x.shape[2] == 1 or x.stride(2) == x.shape[3])
    return PartTokens(
        x if dense else x.contiguous(), None, None, EXACT, 16, x.shape[-1], first, moved
    )


def spans_of(key: PackedLatents, value: PackedLatents) -> list[Span]:
    """Return all tokens of packed keys and values as the newest query sees them."""
    parts = (*key.parts, *value.parts)
    tokens = key.tokens
    ageing = {part.ageing.token_block: part.ageing for part in parts if part.ageing.token_block}
    if not ageing:
        return [_span(0, tokens, [exact(part.exact) for part in parts])]
    blocks = sorted(ageing, reverse=True)
    one = ageing[blocks[0]]
    stops = [one.sinks, *(ageing[block].packed_stop(tokens) for block in blocks), tokens]
    edges = [min(stop, tokens) for stop in stops]
    spans = []
    if one.sinks:
        spans.append(_span(0, edges[0], [_sinks(part) for part in parts]))
    for index, (low, high) in enumerate(itertools.pairwise(edges)):
        if index == len(blocks) and ageing[blocks[-1]].at_once:
            break
        old = [block for block in blocks if blocks.index(block) >= index]
        found = [
            _packed(part, low, moved=index > 0)
            if part.ageing.token_block in old
            else _new(part, low)
            for part in parts
        ]
        spans.append(_span(low, high, found))
    return spans


def _span(low: int, high: int, parts: list[PartTokens]) -> Span:
    return Span(low, max(0, high - low), tuple(parts[:-1]), parts[-1])


def _sinks(part: StoredPart) -> PartTokens:
    return exact(part.sinks if part.ageing.token_block else part.exact)


def _new(part: StoredPart, low: int) -> PartTokens:
    return exact(part.exact, max(0, low - part.exact_start), moved=True)


def _packed(part: StoredPart, low: int, moved: bool) -> PartTokens:
    """Return packed tokens from ``low`` on; before any are packed, a span that must be empty."""
    if part.packed is None or part.quantizer is None:
        return exact(part.exact)
    scheme = part.quantizer.scheme.name
    first = low - part.ageing.sinks
    return PartTokens(*part.packed, scheme, part.quantizer.bits, part.width, first, moved)
