"""What decoding over latents in few bits must return: dequantised, in float64, without a trick."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vdcompress.modeling.decode_spans import PartTokens, Span, exact
from vdcompress.modeling.quantizer import Packed
from vdcompress.modeling.quantizers import quantizer

FORMS = [
    ("exact", 16),
    *(("per_token", bits) for bits in (8, 4, 3, 2)),
    *(("per_channel", bits) for bits in (8, 4, 3, 2)),
    *(("normal", bits) for bits in (4, 3, 2)),
]
Side = list[tuple[int, int, str, int]]  # groups, width, form and bits of each part
GROUPED = [(4, 2), (6, 2), (3, 1), (8, 4), (32, 1), (5, 1)]  # heads, latents
MIXED: list[tuple[Side, tuple[int, int, str, int]]] = [
    ([(8, 16, "exact", 16), (1, 48, "per_token", 4)], (1, 64, "per_token", 4)),
    ([(1, 16, "per_token", 8), (1, 96, "normal", 3)], (1, 128, "normal", 2)),
    ([(4, 24, "normal", 4), (4, 16, "exact", 16)], (4, 40, "exact", 16)),
    ([(2, 18, "per_channel", 4), (2, 14, "per_token", 4)], (8, 24, "per_token", 3)),
    ([(8, 40, "per_token", 8)], (1, 40, "per_channel", 4)),
]
MASKS = ("left padding", "added", "infinite", "of each head")


def drawn(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    spread = torch.rand(shape[-1], generator=draw) * 2
    return (torch.randn(*shape, generator=draw) * spread + 0.2).to(dtype)


def stored(x: Tensor, form: str, bits: int) -> PartTokens:
    """Return latents [b, g, s, w] as a part in a form."""
    if form == "exact":
        return exact(x)
    return PartTokens(*quantizer(form, bits).quantize(x), form, bits, x.shape[-1])


def case(
    keys: Side, value: tuple[int, int, str, int], tokens: int, heads: int, dtype: Any
) -> tuple[Tensor, list[Span]]:
    """Return a query and two sequences of latents."""
    parts = [
        stored(drawn(2, groups, tokens, width, seed=seed, dtype=dtype), form, bits)
        for seed, (groups, width, form, bits) in enumerate((*keys, value))
    ]
    width = sum(width for _, width, *_ in keys)
    query = drawn(2, heads, 1, width, seed=9, dtype=dtype)
    return query, [Span(0, tokens, tuple(parts[:-1]), parts[-1])]


def mask_for(kind: str, tokens: int, dtype: torch.dtype) -> Tensor:
    """Return a mask of two sequences, the second padded in front, for four heads."""
    mask = torch.arange(tokens) >= torch.tensor([[0], [tokens - 20]])
    mask = mask[:, None, None]
    if kind in {"added", "infinite"}:
        lowest = -torch.inf if kind == "infinite" else torch.finfo(dtype).min
        return torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, lowest)
    if kind == "of each head":
        return mask & (torch.arange(tokens) % 7 != torch.arange(4)[:, None])[None, :, None]
    return mask


def read(part: PartTokens) -> Tensor:
    """Return the latents of a part from its first wanted token on, float64."""
    if part.form == "exact":
        return part.codes[:, :, part.first :].double()
    packed = Packed(part.codes, part.scale, part.zero)
    whole = quantizer(part.form, part.bits).dequantize(packed, part.width)
    return whole[:, :, part.first :].double()


def sides(spans: Sequence[Span], heads: int) -> tuple[Tensor, Tensor]:
    """Return keys [b, h, s, k] and values [b, h, s, v] of all tokens, float64."""
    keys, values = [], []
    for span in spans:
        if span.tokens:
            parts = [_of_heads(part, heads, span.tokens) for part in span.parts]
            keys.append(torch.cat(parts[:-1], dim=-1))
            values.append(parts[-1])
    return torch.cat(keys, dim=2), torch.cat(values, dim=2)


def _of_heads(part: PartTokens, heads: int, tokens: int) -> Tensor:
    x = read(part)[:, :, :tokens]
    return x.repeat_interleave(heads // x.shape[1], dim=1)


def attended(query: Tensor, spans: Sequence[Span], mask: Tensor | None, scaling: float) -> Tensor:
    """Return the output [b, h, 1, v] of queries [b, h, 1, k], float64."""
    keys, values = sides(spans, query.shape[1])
    scores = query.double() @ keys.mT * scaling
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        scores = scores + mask.double()
    return scores.softmax(-1) @ values


def error(found: Tensor, expected: Tensor) -> float:
    """Return the relative error in the Euclidean norm; NaN where anything is not finite."""
    difference = found.double().cpu() - expected.cpu()
    return float(difference.norm() / expected.cpu().norm())
