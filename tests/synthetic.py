"""Gains of models that do not exist: seeded, non-increasing and convex."""

from __future__ import annotations

import random

from vdcompress.gains import LayerGains
from vdcompress.plan import ModelShape


def falling(draw: random.Random, steps: int, scale: float = 1.0) -> tuple[float, ...]:
    """Return ``steps + 1`` losses that fall to zero, ever more slowly."""
    parts = sorted((scale * draw.random() ** 4 for _ in range(steps)), reverse=True)
    losses = [sum(parts[index:]) for index in range(steps)]
    return (*losses, 0.0)


def layer_gains(shape: ModelShape, draw: random.Random, weight: float = 1.0) -> LayerGains:
    """Return the gains of a layer that weighs more or less; fewer groups lose less."""
    v, nope, rotary = {}, {}, {}
    partial = shape.rotary_dim < shape.head_dim
    rest = shape.head_dim - shape.rotary_dim if partial else shape.head_dim
    for groups in (n for n in range(1, shape.kv_heads + 1) if shape.kv_heads % n == 0):
        heads, scale = shape.kv_heads // groups, weight * groups / shape.kv_heads
        v[groups] = falling(draw, heads * shape.head_dim, scale)
        nope[groups] = falling(draw, heads * rest, scale)
        rotary[groups] = tuple(
            falling(draw, heads, 4 * scale) for _ in range(shape.rotary_dim // 2 * partial)
        )
    return LayerGains(v, nope, rotary)


def model_gains(shape: ModelShape, seed: int = 0) -> tuple[LayerGains, ...]:
    """Return the gains of every layer; the first weighs most."""
    draw = random.Random(seed)
    return tuple(layer_gains(shape, draw, 4.0**-index) for index in range(shape.layers))
