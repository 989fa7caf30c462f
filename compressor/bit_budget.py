"""Spend bytes on widths and bits together: what a latent leaves out against what rounding adds.

A part of width r in b bits loses ``left out(r) + c(b) * rounding(r)`` nats per token
(:mod:`vdcompress.gains`), c(b) the relative error of its quantiser, and costs the bytes that its
scheme stores. All admissible pairs of both, thinned to those that nothing cheaper beats, are one
curve for each layer and side; :func:`vdcompress.allocate.allocate` spends the budget over them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from vdcompress.allocate import Curve, Keys, allocate, widths
from vdcompress.bits import bits_per_token, packed, relative_error
from vdcompress.modeling.layout import LayerLayout, NopePart, Part, RotaryPart
from vdcompress.modeling.schemes import ROTARY_DEFAULTS

if TYPE_CHECKING:
    from vdcompress.gains import LayerGains
    from vdcompress.plan import ModelShape

PAIR_STEP = 4


@dataclass(frozen=True)
class Option:
    """One way to keep one or more parts of one or more layers.

    Attributes:
        size: bits per token, scales and zero points included.
        loss: nats per token.
        parts: what is kept, by part and then by layer.
    """

    size: int
    loss: float
    parts: tuple[Part, ...]

    def __add__(self, other: Option) -> Option:
        """Return both together."""
        return Option(self.size + other.size, self.loss + other.loss, self.parts + other.parts)


@dataclass(frozen=True)
class Spent:
    """The best layouts, and what they lose in nats per token, as the gains predict."""

    layers: tuple[LayerLayout, ...]
    loss: float


@dataclass(frozen=True)
class Choices:
    """What a plan may choose from.

    Attributes:
        v_groups: numbers of latents of V.
        k_groups: numbers of latents of K.
        v_bits: bits of V.
        k_bits: bits of K, its rotary part aside.
        k_rotary_bits: bits of that.
        by_layer: whether layers may differ.
        sinks: first tokens that stay exact.
        window: newest tokens that stay exact.
    """

    v_groups: Sequence[int]
    k_groups: Sequence[int]
    v_bits: Sequence[int]
    k_bits: Sequence[int]
    k_rotary_bits: Sequence[int]
    by_layer: bool = True
    sinks: int = 0
    window: int = 0


def spend(
    shape: ModelShape, gains: Sequence[LayerGains], budget: int, choices: Choices
) -> Spent | None:
    """Return the layouts that lose least within a budget; None if nothing fits.

    Args:
        shape: of the base.
        gains: of every layer, with what rounding loses.
        budget: bits per token over all layers.
        choices: what may be chosen.
    """
    alike = [[layer] for layer in gains] if choices.by_layer else [list(gains)]
    values = {g: [_values(part, g, choices) for part in alike] for g in choices.v_groups}
    keys = {g: [_keys(shape, part, g, choices) for part in alike] for g in choices.k_groups}
    best: Spent | None = None
    for v, k in itertools.product(choices.v_groups, choices.k_groups):
        if max(v, k) % min(v, k):
            continue
        found = _spend(values[v], keys[k], budget)
        if found and (best is None or found.loss < best.loss):
            best = found
    return best


def _spend(values: list[list[Option]], keys: list[list[Option]], budget: int) -> Spent | None:
    sides = [*values, *keys]
    curves = [Curve(tuple(o.size for o in side), tuple(o.loss for o in side)) for side in sides]
    if sum(curve.sizes[0] for curve in curves) > budget:
        return None
    indices = allocate(curves, budget)
    chosen = [side[index] for side, index in zip(sides, indices, strict=True)]
    pairs = zip(chosen[: len(values)], chosen[len(values) :], strict=True)
    layers = [layout for v, k in pairs for layout in _layouts(v, k)]
    return Spent(tuple(layers), sum(option.loss for option in chosen))


def _layouts(v: Option, k: Option) -> list[LayerLayout]:
    count = len(v.parts)
    parts = zip(v.parts, k.parts[:count], k.parts[count:], strict=True)
    return [LayerLayout(*of_layer) for of_layer in parts]  # type: ignore[arg-type]


def _values(layers: Sequence[LayerGains], groups: int, choices: Choices) -> list[Option]:
    """Return the ways to keep V of layers that are alike, cheapest first."""
    return thinned(_together([_value_options(layer, groups, choices) for layer in layers]))


def _keys(
    shape: ModelShape, layers: Sequence[LayerGains], groups: int, choices: Choices
) -> list[Option]:
    """Return the ways to keep K of layers that are alike, cheapest first."""
    whole = shape.rotary_dim == shape.head_dim
    empty = NopePart(groups, 0)
    if whole:
        empty = NopePart(groups, 0, maps="per_head", after_rope=True)
    still = thinned(_together([_nope_options(layer, empty, choices) for layer in layers]))
    if whole:
        turned = [Option(0, 0.0, (RotaryPart(groups, 0, maps="per_head"),) * len(layers))]
    else:
        turned = thinned(_together([_rotary_options(layer, groups, choices) for layer in layers]))
    both = (a + b for a, b in itertools.product(still, turned))
    return thinned(option for option in both if option.size)


def _value_options(gains: LayerGains, groups: int, choices: Choices) -> list[Option]:
    left, rounding = gains.v[groups], gains.rounding.v[groups]
    sizes = itertools.product(widths(len(left) - 1), choices.v_bits)
    parts = (packed(Part(groups, width), bits) for width, bits in sizes)
    return [_option(part, left[part.width], rounding[part.width], choices) for part in parts]


def _nope_options(gains: LayerGains, empty: NopePart, choices: Choices) -> list[Option]:
    left, rounding = gains.k_nope[empty.groups], gains.rounding.k_nope[empty.groups]
    sizes = itertools.product((0, *widths(len(left) - 1)), choices.k_bits)
    parts = (packed(replace(empty, width=width), bits) for width, bits in sizes)
    return [_option(part, left[part.width], rounding[part.width], choices) for part in parts]


def _rotary_options(gains: LayerGains, groups: int, choices: Choices) -> list[Option]:
    keys, count, found = Keys(gains, groups), len(gains.k_rotary[groups]), []
    for pairs in range(0, keys.pairs + 1, PAIR_STEP):
        kept, left = keys.rotary(pairs)
        rounding = gains.rounding.rotary(groups, [kept.count(index) for index in range(count)])
        whole = RotaryPart(groups, 2 * pairs, frequencies=kept)
        parts = (packed(whole, bits, ROTARY_DEFAULTS) for bits in choices.k_rotary_bits)
        found += [_option(part, left, rounding, choices) for part in parts]
    return found


def _option(part: Part, left: float, rounding: float, choices: Choices) -> Option:
    size = bits_per_token(part, choices.sinks, choices.window)
    return Option(size, left + relative_error(part) * rounding, (part,))


def _together(layers: Sequence[Sequence[Option]]) -> list[Option]:
    """Return the options of several layers that choose alike; all have theirs in one order."""
    return [
        Option(sum(o.size for o in row), sum(o.loss for o in row), sum((o.parts for o in row), ()))
        for row in zip(*layers, strict=True)
    ]


def thinned(options: Iterable[Option]) -> list[Option]:
    """Return the options that no cheaper one beats, cheapest first."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda found: (found.size, found.loss)):
        if not kept or option.loss < kept[-1].loss:
            kept.append(option)
    return kept
