"""Caches of one layer for ``decode_cuda.py``: shapes, random contents, bytes and reference."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vdcompress.modeling.decode_spans import PartTokens, Span, exact
from vdcompress.modeling.quantizer import Packed
from vdcompress.modeling.quantizers import quantizer
from vdcompress.modeling.schemes import SCHEMES, packed_width

DTYPE = torch.bfloat16
ROOM = 64  # tokens that a room is a multiple of
Form = tuple[int, str, int]  # width, form, bits


@dataclass(frozen=True)
class Case:
    """A layer, a batch and a context.

    Attributes:
        name: of the cache.
        heads: query heads.
        groups: latents per token and side.
        keys: width, form and bits of each part of the keys.
        value: likewise.
        base: key/value heads of the original, and their width.
        batch: sequences.
        tokens: of a sequence.
        sinks: first tokens in 16 bits.
        window: newest tokens in 16 bits.
        target_us: what it must reach on an H200, if anything was asked.
    """

    name: str
    heads: int
    groups: int
    keys: tuple[Form, ...]
    value: Form
    base: tuple[int, int]
    batch: int
    tokens: int
    sinks: int = 0
    window: int = 0
    target_us: float | None = None

    @property
    def shape(self) -> str:
        """What cases of one baseline have in common."""
        kv_heads, width = self.base
        heads = (
            f"{self.heads} heads" if kv_heads == self.heads else f"{self.heads}/{kv_heads} heads"
        )
        return f"{heads} of {width}, batch {self.batch}, {self.tokens} tokens"

    @property
    def query_width(self) -> int:
        """Dimensions of a query."""
        return sum(width for width, *_ in self.keys)


BF16, INT8, INT4, INT3, INT2 = (
    ("exact", 16),
    ("per_token", 8),
    ("per_token", 4),
    ("normal", 3),
    ("normal", 2),
)
EIGHT, ONE, GROUPED = (8, 8, (8, 64)), (8, 1, (8, 64)), (32, 8, (8, 128))


Layer = tuple[int, int, tuple[int, int]]


def _layer(
    name: str, layer: Layer, keys: tuple[Form, ...], value: Form, target: float | None = None
) -> tuple[Any, ...]:
    heads, groups, base = layer
    return (name, heads, groups, keys, value, base, target)


def _even(
    name: str, layer: Layer, width: int, form: tuple[str, int], target: float | None = None
) -> tuple[Any, ...]:
    part = (width, *form)
    return _layer(name, layer, (part,), part, target)


BY_CHANNEL = (40, "per_channel", 4)
LAYERS = (
    _even("bf16 64/64", EIGHT, 64, BF16),
    _even("bf16 40/40", EIGHT, 40, BF16, 100),
    _even("int8 40/40", EIGHT, 40, INT8, 55),
    _even("int4 40/40", EIGHT, 40, INT4, 30),
    _even("normal 3 bits 40/40", EIGHT, 40, INT3),
    _even("normal 2 bits 40/40", EIGHT, 40, INT2),
    _layer("int4 40/40, K by channel", EIGHT, (BY_CHANNEL,), (40, *INT4)),
    _layer("K 16 bf16 + 24 int4, V 40 int4", EIGHT, ((16, *BF16), (24, *INT4)), (40, *INT4)),
    _layer("K 16 int8 + 48 int8, V 64 int8", EIGHT, ((16, *INT8), (48, *INT8)), (64, *INT8)),
    _layer("K 16 int8 + 48 int4, V 64 int4", EIGHT, ((16, *INT8), (48, *INT4)), (64, *INT4)),
    _even("shared bf16 192/192", ONE, 192, BF16, 60),
    _even("shared int8 192/192", ONE, 192, INT8, 35),
    _even("shared int4 192/192", ONE, 192, INT4, 22),
    _layer("shared K 64 int8 + 128 int4, V int4", ONE, ((64, *INT8), (128, *INT4)), (192, *INT4)),
    _even("grouped bf16 128/128", GROUPED, 128, BF16),
    _even("grouped bf16 80/80", GROUPED, 80, BF16),
    _even("grouped int8 128/128", GROUPED, 128, INT8),
    _even("grouped int4 128/128", GROUPED, 128, INT4),
    _even("grouped int4 80/80", GROUPED, 80, INT4),
)


def cases(batch: int, tokens: int, *, targets: bool = False) -> list[Case]:
    """Return every layer at one batch and context; one more with sinks and a window."""
    found = [
        Case(*layer[:-1], batch, tokens, target_us=layer[-1] if targets else None)
        for layer in LAYERS
    ]
    part = (40, *INT4)
    name = "int4 40/40, 4 sinks, window 64"
    return [*found, Case(name, *EIGHT[:2], (part,), part, EIGHT[2], batch, tokens, 4, 64)]


def drawn_part(
    batch: int, groups: int, tokens: int, form: Form, device: str, draw: torch.Generator
) -> PartTokens:
    """Return random latents, whose rooms are a little larger than they are."""
    width, name, bits = form
    room = -(-tokens // ROOM) * ROOM
    shape = (batch, groups, room)
    if name == "exact":
        numbers = torch.randn(*shape, width, generator=draw, device=device, dtype=DTYPE)
        return exact(numbers[:, :, :tokens])
    scheme = SCHEMES[name]
    blocks = (batch, groups, room // scheme.token_block, scheme.blocks(width))
    codes = torch.randint(
        0,
        256,
        (*shape, packed_width(width, bits)),
        generator=draw,
        device=device,
        dtype=torch.uint8,
    )
    scale = torch.rand(blocks, generator=draw, device=device) + 0.5
    scale = (scale * (2.0 if name == "normal" else 4.0 / 2**bits)).half()
    zero = torch.randint(96, 160, blocks, generator=draw, device=device, dtype=torch.uint8)
    kept = tokens // scheme.token_block
    return PartTokens(
        codes[:, :, :tokens],
        scale[:, :, :kept],
        zero[:, :, :kept] if scheme.zero_bytes else None,
        name,
        bits,
        width,
    )


def drawn_spans(case: Case, device: str, draw: torch.Generator) -> list[Span]:
    """Return a random cache."""
    edges = (0, case.sinks, case.tokens - case.window, case.tokens)
    spans = []
    for index, (low, high) in enumerate(itertools.pairwise(edges)):
        if low < high:
            parts = [
                drawn_part(
                    case.batch,
                    case.groups,
                    high - low,
                    form if index == 1 else (form[0], *BF16),
                    device,
                    draw,
                )
                for form in (*case.keys, case.value)
            ]
            spans.append(Span(low, high - low, tuple(parts[:-1]), parts[-1]))
    return spans


def nbytes(spans: list[Span]) -> int:
    """Return the bytes that attention must read."""
    tensors = [x for span in spans for part in span.parts for x in part[:3] if x is not None]
    return sum(x.numel() * x.element_size() for x in tensors)


def reference(query: Tensor, spans: list[Span], scaling: float) -> Tensor:
    """Return the output [b, h, 1, v] in float64 of queries [b, h, 1, k]."""
    sides = []
    for span in spans:
        parts = [_numbers(part) for part in span.parts]
        sides.append((torch.cat(parts[:-1], dim=-1), parts[-1]))
    key, value = (torch.cat(side, dim=2) for side in zip(*sides, strict=True))
    grouped = query.double().unflatten(1, (key.shape[1], -1)).squeeze(-2)
    weights = (grouped @ key.mT * scaling).softmax(-1)
    return (weights @ value).flatten(1, 2).unsqueeze(2)


def _numbers(part: PartTokens) -> Tensor:
    if part.form == "exact":
        return part.codes.double()
    packed = Packed(part.codes, part.scale, part.zero)
    return quantizer(part.form, part.bits).dequantize(packed, part.width).double()
