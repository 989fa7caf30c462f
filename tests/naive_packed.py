"""Attention over a packed cache, written down token by token in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from vdcompress.modeling.layout import LayerLayout, NopePart, Part, RotaryPart
from vdcompress.modeling.quantizers import quantizer
from vdcompress.modeling.schemes import GROUP_TOKENS


def as_seen(x: Tensor, part: Part, tokens: int, sinks: int, window: int) -> Tensor:
    """Return what a query that sees ``tokens`` tokens reads of one part x [b, g, s, w]."""
    if part.bits == 16:
        return x[:, :, :tokens]
    block = GROUP_TOKENS if part.quantizer == "per_channel" else 1
    packed = max(0, tokens - sinks - window) // block * block
    rounded = quantizer(part.quantizer, part.bits).read_back(x[:, :, sinks : sinks + packed])
    return torch.cat((x[:, :, :sinks], rounded, x[:, :, sinks + packed : tokens]), 2)[:, :, :tokens]


def side_as_seen(x: Tensor, parts: list[Part], tokens: int, sinks: int, window: int) -> Tensor:
    pieces = x.split([part.width for part in parts], dim=-1)
    found = [as_seen(p, part, tokens, sinks, window) for p, part in zip(pieces, parts, strict=True)]
    return torch.cat(found, dim=-1).double()


def naive_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: LayerLayout,
    *,
    scaling: float,
    sinks: int = 0,
    window: int = 0,
    mask: Tensor | None = None,
) -> Tensor:
    """Return the outputs [b, h, s, v] of queries [b, h, s, k]; NaN where nothing is seen.

    Args:
        mask: [b, s, s], True attends; None is causal.
    """
    b, h, s, _ = query.shape
    k_parts = [part for part in (layout.k_rotary, layout.k_nope) if part.width]
    out = torch.zeros(b, h, s, value.shape[-1], dtype=torch.float64)
    for i in range(s):
        keys = side_as_seen(key, k_parts, i + 1, sinks, window)
        values = side_as_seen(value, [layout.v], i + 1, sinks, window)
        for head in range(h):
            k = keys[:, head * keys.shape[1] // h]
            v = values[:, head * values.shape[1] // h]
            scores = torch.einsum("bsk,bk->bs", k, query[:, head, i].double()) * scaling
            if mask is not None:
                scores = scores.masked_fill(~mask[:, i, : i + 1], -torch.inf)
            out[:, head, i] = torch.einsum("bs,bsv->bv", scores.softmax(-1), v)
    return out


def layer(
    v: Part,
    nope: tuple[int, int, int, str | None] | None,
    rotary: tuple[int, int, int, str | None] | None,
) -> LayerLayout:
    """Return a layout from groups, width, bits and quantiser of each part of K."""
    groups = (nope or rotary or (1,))[0]
    n, r = nope or (groups, 0, 16, None), rotary or (groups, 0, 16, None)
    return LayerLayout(v, NopePart(*n), RotaryPart(*r, frequencies=tuple(range(r[1] // 2))))


LAYERS = {
    "per token, a latent for each head": layer(
        Part(4, 40, 4, "per_token"), (4, 24, 8, "per_token"), (4, 16, 16, None)
    ),
    "grouped queries, unequal groups": layer(
        Part(1, 72, 3, "normal"), (2, 24, 4, "normal"), (2, 8, 8, "per_token")
    ),
    "one latent, blocks of 64": layer(
        Part(1, 128, 2, "normal"), (1, 96, 3, "per_token"), (1, 32, 4, "per_channel")
    ),
    "channels everywhere": layer(
        Part(2, 16, 4, "per_channel"), (2, 16, 2, "per_channel"), (2, 8, 3, "per_channel")
    ),
    "V exact": layer(Part(2, 24), (2, 16, 4, "per_channel"), None),
    "only rotary keys, in bits": layer(Part(2, 24, 8, "per_token"), None, (2, 16, 8, "per_token")),
}
