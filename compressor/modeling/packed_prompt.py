"""A prompt's attention over packed latents, by torch's scaled dot product attention.

Tokens of a prompt age while it is read: each query sees some packed that an earlier one saw exact.
So a token is a key once for each form that some query sees it in, and a mask leaves each query one
of them. What is unpacked is of the size of the prompt, whose latents are there anyway. Letters: b
sequences, h query heads, g latents, t queries, s keys.
"""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from .packed_latents import Ageing, PackedLatents, StoredPart

LEAST_QUERIES = 32  # for which unpacking is worth it
MOST_TOKENS = 4  # for each query: what is unpacked stays of the size of the prompt
QUERIES = 512  # attended together
ALIGNED = 8  # numbers that widths are a multiple of for the kernel on CUDA


@dataclass(frozen=True)
class _Form:
    """Tokens that some queries see in one combination of packed and exact parts.

    Attributes:
        low: the first token that any query sees so.
        high: one past the last one.
        starts: the first token that each query sees so [t].
        stops: one past the last one.
        old: blocks of tokens whose parts are packed.
    """

    low: int
    high: int
    starts: Tensor
    stops: Tensor
    old: frozenset[int]

    def read(self, parts: list[_Part], heads: int) -> Tensor:
        """Return the tokens of a side, a copy for each head [b, h, high - low, width]."""
        found = torch.cat([part.read(self) for part in parts], dim=-1)
        return found.repeat_interleave(heads // found.shape[1], dim=1)


class _Part:
    """A part and its packed tokens, which are unpacked once for all queries."""

    def __init__(self, part: StoredPart) -> None:
        self.part, self.first = part, part.ageing.sinks
        some = part.packed_stop > self.first
        self.unpacked = part.unpacked(self.first, part.packed_stop) if some else part.exact

    def read(self, form: _Form) -> Tensor:
        """Return the tokens of a form [b, g, high - low, width]."""
        if self.part.ageing.token_block in form.old:
            return self.unpacked[:, :, form.low - self.first : form.high - self.first]
        return self.part.of_exact(form.low, form.high)


def is_prompt(query: Tensor, key: PackedLatents) -> bool:
    """Whether so many queries are new that their tokens are worth unpacking."""
    t = query.shape[2]
    return t >= LEAST_QUERIES and key.tokens <= MOST_TOKENS * t


def attend_prompt(
    query: Tensor, key: PackedLatents, value: PackedLatents, mask: Tensor | None, scaling: float
) -> Tensor:
    """Attend with the newest queries of a sequence.

    Args:
        query: [b, h, t, k].
        key: [b, g, s, k].
        value: [b, g', s, v].
        mask: boolean (True attends) or additive, broadcastable to [b, h, t, s]; None lets each
            query see the tokens up to its own.
        scaling: factor of the scores.

    Returns:
        The output [b, h, t, v] in the query's dtype.
    """
    found, before = [], key.tokens - query.shape[2]
    sides = [[_Part(part) for part in side.parts] for side in (key, value)]
    for rows in query.split(QUERIES, dim=2):
        seen = before + torch.arange(1, rows.shape[2] + 1, device=query.device)
        own = mask
        if mask is not None and mask.shape[-2] > 1:
            first = before - (key.tokens - query.shape[2])
            own = mask[..., first : first + rows.shape[2], :]
        last = before + rows.shape[2]
        forms = _forms(key, value, before + 1, last, seen)
        keys, values = (
            torch.cat([form.read(side, query.shape[1]) for form in forms], dim=2) for side in sides
        )
        found.append(_attended(rows, keys, values, _added(forms, own, query), scaling))
        before = last
    return torch.cat(found, dim=2)


def _forms(
    key: PackedLatents, value: PackedLatents, first: int, last: int, seen: Tensor
) -> list[_Form]:
    """Return the forms in which queries see their tokens, those of the oldest first.

    Args:
        key: of all tokens.
        value: likewise.
        first: tokens that the first query sees.
        last: tokens that the last one sees.
        seen: tokens that each sees [t].
    """
    ageings = {part.ageing.token_block: part.ageing for part in (*key.parts, *value.parts)}
    blocks = sorted(ageings.keys() - {0}, reverse=True)
    sinks = min(ageings[blocks[0]].sinks, last)
    edges: list[Ageing | None] = [None, *(ageings[block] for block in blocks), None]
    none = torch.zeros_like(seen)
    forms = [_Form(0, sinks, none, seen, frozenset())]
    for index, (newer, older) in enumerate(itertools.pairwise(edges)):
        low = newer.packed_stop(first) if newer else sinks
        high = older.packed_stop(last) if older else last
        starts = newer.packed_stops(seen) if newer else none + sinks
        stops = torch.minimum(older.packed_stops(seen), seen) if older else seen
        if not (newer and older is None and newer.at_once):
            forms.append(_Form(low, min(high, last), starts, stops, frozenset(blocks[index:])))
    return [form for form in forms if form.low < form.high]


def _added(forms: list[_Form], mask: Tensor | None, query: Tensor) -> Tensor:
    """Return what is added to scores: 0 for the one form of each token that a query sees.

    It is finite, so that a query that sees nothing, such as a padding's, stays a number.
    """
    tokens = [torch.arange(form.low, form.high, device=query.device) for form in forms]
    seen = torch.cat(
        [
            (own >= form.starts[:, None]) & (own < form.stops[:, None])
            for form, own in zip(forms, tokens, strict=True)
        ],
        dim=-1,
    )
    added, lowest = query.new_zeros(()), torch.finfo(query.dtype).min
    if mask is not None:
        own = mask[..., torch.cat(tokens)]
        if own.dtype == torch.bool:
            seen = seen & own
        else:
            added = own.clamp_min(lowest).to(query)
    found = torch.where(seen, added, query.new_full((), lowest))
    return found.view((1,) * (4 - found.dim()) + found.shape)


def _attended(query: Tensor, key: Tensor, value: Tensor, added: Tensor, scaling: float) -> Tensor:
    """Attend by the kernel that takes what is added to scores, after what it wants of widths."""
    width = value.shape[-1]
    if query.is_cuda:
        query, key, value = (
            padded(x, -(-x.shape[-1] // ALIGNED) * ALIGNED) for x in (query, key, value)
        )
        kernels = sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])
    else:
        widest = max(key.shape[-1], width)
        query, key, value = (padded(x, widest) for x in (query, key, value))
        kernels = nullcontext()
    with kernels:
        found = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=added, scale=scaling
        )
    return found[..., :width]


def padded(x: Tensor, width: int) -> Tensor:
    """Return ``x`` [..., n] with zeros behind it, [..., width]."""
    return x if x.shape[-1] == width else functional.pad(x, (0, width - x.shape[-1]))
