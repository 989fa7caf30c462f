"""Attention over packed latents on any device: a span of tokens after another, in plain torch.

A softmax that is corrected from span to span joins them, and latents are unpacked a few at a time
(:mod:`packed_products`), so nothing of the size of the cache is ever made. Only a prompt's own
tokens are unpacked at once, :mod:`packed_prompt`. Shapes as in :mod:`attention`. A kernel for a
device plugs in by :func:`use_kernel`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .packed_latents import PackedLatents, StoredPart
from .packed_products import scores, weighted_sum
from .packed_prompt import attend_prompt, is_prompt

QUERIES = 512  # of a prompt, attended together
SCORES = 2**22  # at a time
FEWEST, MOST = 128, 2**14  # tokens at a time
LOWEST = torch.finfo(torch.float32).min

Kernel = Callable[[Tensor, PackedLatents, PackedLatents, Tensor | None, float], Tensor | None]
_kernels: dict[str, Kernel] = {}


def use_kernel(device_type: str, kernel: Kernel) -> None:
    """Let a kernel attend on devices of a type.

    Args:
        device_type: such as ``cuda``.
        kernel: maps query [b, h, t, k], keys, values, mask and the factor of the scores to the
            output [b, h, t, v], or None where it leaves the case to this file.
    """
    _kernels[device_type] = kernel


def packed_attention(
    _module: nn.Module,
    query: Tensor,
    key: PackedLatents,
    value: PackedLatents,
    attention_mask: Tensor | None,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend over packed latents.

    Args:
        query: [b, h, t, k], of the newest t tokens.
        key: [b, g, s, k].
        value: [b, g', s, v].
        attention_mask: boolean (True attends) or additive, broadcastable to [b, h, t, s]; None
            lets each query see the tokens up to its own.
        scaling: factor of the scores.

    Returns:
        The output [b, t, h, v], and None for the weights.
    """
    kernel = _kernels.get(query.device.type)
    found = kernel(query, key, value, attention_mask, scaling) if kernel else None
    if found is None:
        if key.counted:
            raise RuntimeError("only the kernel for CUDA reads what is counted on the device")
        attend = attend_prompt if is_prompt(query, key) else _in_blocks
        found = attend(query, key, value, attention_mask, scaling)
    return found.transpose(1, 2).contiguous(), None


def _in_blocks(
    query: Tensor, key: PackedLatents, value: PackedLatents, mask: Tensor | None, scaling: float
) -> Tensor:
    t = query.shape[2]
    dtype = query.dtype if query.dtype == torch.float64 else torch.float32
    chunks = [
        _Queries(query[:, :, first : first + QUERIES].to(dtype) * scaling, first, key.tokens - t)
        for first in range(0, t, QUERIES)
    ]
    rows = query.shape[0] * query.shape[1] * min(t, QUERIES)
    for start, stop in _spans(key, value, t, rows):
        for chunk in chunks:
            chunk.attend(key, value, start, stop, mask)
    return torch.cat([chunk.output() for chunk in chunks], dim=2).to(query.dtype)


def _spans(
    key: PackedLatents, value: PackedLatents, t: int, rows: int
) -> Iterator[tuple[int, int]]:
    """Yield ranges of tokens; in each, a part has its tokens in the same forms.

    Args:
        key: of all tokens.
        value: likewise.
        t: queries of the chunk.
        rows: queries that are attended together, over all heads and sequences.
    """
    tokens, parts = key.tokens, (*key.parts, *value.parts)
    fixed = {0, tokens}
    for part in parts:
        for edge in (
            part.ageing.sinks,
            part.ageing.packed_stop(tokens - t + 1),
            part.packed_stop,
        ):
            fixed.add(min(edge, tokens))
    size = min(max(FEWEST, SCORES // rows // FEWEST * FEWEST), MOST)
    edges = sorted(fixed)
    for low, high in itertools.pairwise(edges):
        for start in range(low, high, size):
            yield start, min(start + size, high)


@dataclass
class _Queries:
    """Some queries of a chunk and what they have seen so far.

    Attributes:
        query: [b, h, t, k], scaled.
        first: number of its first query among all of the chunk.
        before: tokens in front of the chunk.
    """

    query: Tensor
    first: int
    before: int

    def __post_init__(self) -> None:
        b, h, t, _ = self.query.shape
        seen = torch.arange(t, device=self.query.device) + self.before + self.first + 1
        self._seen = seen  # tokens that each query sees
        self._last = self.before + self.first + t
        self._highest = self.query.new_full((b, h, t, 1), -torch.inf)
        self._norm = self.query.new_zeros(b, h, t, 1)
        self._sum: Tensor | None = None

    def attend(
        self,
        key: PackedLatents,
        value: PackedLatents,
        start: int,
        stop: int,
        mask: Tensor | None,
    ) -> None:
        """Take in the tokens from ``start`` to ``stop``."""
        if mask is None and start >= self._last:
            return
        found = self._masked(self._scores(key, start, stop), start, stop, mask)
        highest = torch.maximum(self._highest, found.amax(-1, keepdim=True))
        weights = found.sub_(highest).exp_()
        kept = (self._highest - highest).exp_()
        self._norm = self._norm * kept + weights.sum(-1, keepdim=True)
        self._highest = highest
        added = self._sums(value.parts[0], weights, start, stop)
        self._sum = added if self._sum is None else self._sum.mul_(kept).add_(added)

    def output(self) -> Tensor:
        """Return the averages [b, h, t, v]."""
        if self._sum is None:
            raise ValueError("there are no tokens to attend to")
        return self._sum / self._norm

    def _masked(self, found: Tensor, start: int, stop: int, mask: Tensor | None) -> Tensor:
        if mask is not None:
            rows = slice(self.first, self.first + found.shape[2])
            block = mask[..., rows, start:stop] if mask.shape[-2] > 1 else mask[..., start:stop]
            if block.dtype == torch.bool:
                return found.masked_fill_(~block, LOWEST)
            return found.add_(block).clamp_min_(LOWEST)
        if stop <= int(self._last - found.shape[2] + 1):
            return found
        tokens = torch.arange(start, stop, device=found.device)
        return found.masked_fill_(tokens >= self._seen[:, None], LOWEST)

    def _scores(self, key: PackedLatents, start: int, stop: int) -> Tensor:
        """Return the scores [b, h, t, stop - start], summed over the parts of the keys."""
        widths = [part.width for part in key.parts]
        queries = self.query.split(widths, dim=-1)
        total, *rest = [
            self._by_form(part, start, stop, query)
            for part, query in zip(key.parts, queries, strict=True)
        ]
        for other in rest:
            total = total.add_(other)
        return total

    def _by_form(self, part: StoredPart, start: int, stop: int, query: Tensor) -> Tensor:
        """Return one part's scores from the form in which each query sees the tokens."""
        b, h, t, _ = query.shape
        grouped = query.reshape(b, part.exact.shape[1], -1, part.width)
        if not part.is_packed(start):
            return (grouped @ part.of_exact(start, stop).to(query.dtype).mT).view(b, h, t, -1)
        quantizer, tokens, before, _ = part.of_packed(start, stop)
        packed = scores(quantizer, tokens, grouped)[..., before : before + stop - start]
        packed = packed.reshape(b, h, t, -1)
        if not self._sees_exactly(part, start, stop):
            return packed
        exact = (grouped @ part.of_exact(start, stop).to(query.dtype).mT).view(b, h, t, -1)
        return torch.where(self._packed_for(part, start, stop), packed, exact)

    def _sums(self, part: StoredPart, weights: Tensor, start: int, stop: int) -> Tensor:
        """Return the weighted sums [b, h, t, v] of the values that each query sees."""
        b, h, t, s = weights.shape
        shape = (b, part.exact.shape[1], -1, s)
        if not part.is_packed(start):
            values = part.of_exact(start, stop).to(weights.dtype)
            return (weights.reshape(shape) @ values).view(b, h, t, -1)
        quantizer, tokens, *extra = part.of_packed(start, stop)
        both = self._sees_exactly(part, start, stop)
        chosen = self._packed_for(part, start, stop) if both else None
        mine = (weights if chosen is None else weights * chosen).reshape(shape)
        mine = functional.pad(mine, extra) if any(extra) else mine
        total = weighted_sum(quantizer, tokens, mine, part.width)
        if chosen is not None:
            values = part.of_exact(start, stop).to(weights.dtype)
            total = total + (weights * ~chosen).reshape(shape) @ values
        return total.view(b, h, t, -1)

    def _sees_exactly(self, part: StoredPart, start: int, stop: int) -> bool:
        """Whether the first query sees some of these packed tokens exactly."""
        if part.ageing.at_once or start >= self._last:
            return False
        return part.ageing.packed_stop(self.before + self.first + 1) < stop

    def _packed_for(self, part: StoredPart, start: int, stop: int) -> Tensor:
        """Return which tokens each query sees packed, [t, stop - start]."""
        tokens = torch.arange(start, stop, device=self.query.device)
        return tokens < part.ageing.packed_stops(self._seen)[:, None]
