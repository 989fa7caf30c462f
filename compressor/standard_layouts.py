"""The layouts that most people want, for a model of any shape: what ``inspect MODEL`` compares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vdcompress.modeling.layout import LayerLayout, NopePart, Part, RotaryPart
from vdcompress.request import STEP

if TYPE_CHECKING:
    from vdcompress.plan import ModelShape

SAME_WIDTH, HALF, MULTI_QUERY = 5 / 8, 1 / 2, 3 / 8


@dataclass(frozen=True)
class Standard:
    """A layout and the options of ``apply`` that ask for it.

    Attributes:
        options: empty for the base.
        layer: the layout of every layer. How a narrow K divides into parts is left to the plan,
            and does not matter to what it costs or who serves it.
    """

    options: str
    layer: LayerLayout


def standard_layouts(shape: ModelShape) -> tuple[Standard, ...]:
    """Return the base's layout and those that narrow it, the largest first."""
    heads = shape.kv_heads
    narrow = _width(shape, SAME_WIDTH, heads)
    found = [
        Standard("", shape.full_layout()),
        Standard(f"--v-dim {narrow}", _layer(shape, heads, narrow, None)),
        Standard(f"--v-dim {narrow} --k-dim {narrow}", _layer(shape, heads, narrow, narrow)),
    ]
    if heads > 1:
        shared = _width(shape, SAME_WIDTH, 1)
        found.insert(2, Standard(f"--groups 1 --v-dim {shared}", _layer(shape, 1, shared, None)))
    if heads > 2 and heads % 2 == 0:
        found.append(_both(shape, 2, _width(shape, HALF, 2)))
    if heads > 1:
        found.append(_both(shape, 1, _width(shape, MULTI_QUERY, 1)))
    return tuple(found)


def _both(shape: ModelShape, groups: int, width: int) -> Standard:
    options = f"--groups {groups} --v-dim {width} --k-dim {width}"
    return Standard(options, _layer(shape, groups, width, width))


def _layer(shape: ModelShape, groups: int, v_dim: int, k_dim: int | None) -> LayerLayout:
    full, values = shape.full_layout(), Part(groups, v_dim // groups)
    if k_dim is None:
        return LayerLayout(values, full.k_nope, full.k_rotary)
    behind = shape.rotary_dim == shape.head_dim
    maps = "per_head" if behind else "folded"
    nope = NopePart(groups, k_dim // groups, maps=maps, after_rope=behind)
    return LayerLayout(values, nope, RotaryPart(groups, 0, maps=maps))


def _width(shape: ModelShape, share: float, groups: int) -> int:
    """Return the width over all groups that is nearest to a share of the base's."""
    step = STEP * groups
    return max(min(step, shape.kv_dim), round(share * shape.kv_dim / step) * step)
