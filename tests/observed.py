"""What runs through a base's attention, written down from its weights, one head after the other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vdcompress.families.base import Projection
from vdcompress.load import Base


@dataclass(frozen=True)
class Observed:
    """One layer's attention.

    Attributes:
        x: what the module is given, [b, t, hidden].
        given: what it returned, [b, t, hidden].
        queries: behind RoPE, [b, t, H, d].
        keys: behind RoPE, [b, t, G, d].
        values: [b, t, G, d].
        outputs: averaged values, [b, t, H, d].
        y: what naive attention returns, [b, t, hidden].
    """

    x: Tensor
    given: Tensor
    queries: Tensor
    keys: Tensor
    values: Tensor
    outputs: Tensor
    y: Tensor


def apply(projection: Projection, x: Tensor) -> Tensor:
    return nn.functional.linear(x, projection.weight, projection.bias)


def observe(base: Base, ids: Tensor) -> list[Observed]:
    """Run the base on token ids [b, t] and calculate every layer's attention again."""
    seen: list[tuple[Tensor, Tensor]] = []

    def record(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        seen.append((args[0] if args else kwargs["hidden_states"], output[0]))

    modules = base.family.attention_modules(base.model)
    handles = [module.register_forward_hook(record, with_kwargs=True) for module in modules]
    with torch.no_grad():
        base.model.base_model(ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return [_attend(base, module, *pair) for module, pair in zip(modules, seen, strict=True)]


def _attend(base: Base, attention: nn.Module, x: Tensor, given: Tensor) -> Observed:
    shape, weights = base.shape, base.family.weights(attention)
    frequencies, scale = base.family.rotary(base.config)
    angles = torch.arange(x.shape[1])[:, None] * torch.tensor(frequencies)
    cos, sin, pairs = angles.cos() * scale, angles.sin() * scale, shape.rotary_dim // 2

    def rope(head: Tensor) -> Tensor:
        a, b, rest = head.split([pairs, pairs, shape.head_dim - 2 * pairs], dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=-1)

    q, k, v = (apply(p, x).split(shape.head_dim, dim=-1) for p in (weights.q, weights.k, weights.v))
    q, k = [rope(head) for head in q], [rope(head) for head in k]
    future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    outputs = []
    for head in range(shape.heads):
        group = head // (shape.heads // shape.kv_heads)
        scores = q[head] @ k[group].mT / shape.head_dim**0.5
        outputs.append(scores.masked_fill(future, -torch.inf).softmax(-1) @ v[group])
    q, k, v, averaged = (torch.stack(list(heads), dim=2) for heads in (q, k, v, outputs))
    return Observed(x, given, q, k, v, averaged, apply(weights.o, averaged.flatten(2)))
