"""Widths and bits from one budget, beside exhaustive search and the quantisers themselves."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest

from synthetic import model_gains
from vdcompress.allocate import predicted_loss
from vdcompress.bit_budget import Choices, Option, spend, thinned
from vdcompress.bits import bits_per_token, packed, relative_error
from vdcompress.gains import LayerGains, LayerRounding
from vdcompress.modeling.layout import LayerLayout, NopePart, Part, RotaryPart
from vdcompress.modeling.schemes import ROTARY_DEFAULTS
from vdcompress.plan import ModelShape, Plan

TINY = ModelShape("gpt_neox", layers=2, hidden=64, heads=2, kv_heads=2, head_dim=16, rotary_dim=8)
WHOLE = replace(TINY, family="llama", rotary_dim=16)
BITS = (16, 8, 4, 3, 2)


def rounded(gains: LayerGains, seed: int) -> LayerGains:
    """Add what rounding loses, from singular values that the gains stand for."""

    def roots(curve: tuple[float, ...]) -> list[float]:
        return [math.sqrt(max(a - b, 0.0)) for a, b in itertools.pairwise(curve)]

    def by_width(curve: tuple[float, ...]) -> tuple[float, ...]:
        sums = list(itertools.accumulate(roots(curve)))
        return (0.0, *(total**2 / r for r, total in enumerate(sums, 1)))

    turned = {
        groups: tuple(
            tuple((0.0, *itertools.accumulate(roots(curve))) for curve in curves)
            for _ in range(groups)
        )
        for groups, curves in gains.k_rotary.items()
    }
    rounding = LayerRounding(
        {g: by_width(curve) for g, curve in gains.v.items()},
        {g: by_width(curve) for g, curve in gains.k_nope.items()},
        turned,
    )
    return replace(gains, rounding=rounding)


def gains_of(shape: ModelShape, seed: int = 0) -> list[LayerGains]:
    return [rounded(layer, seed) for layer in model_gains(shape, seed)]


def lost(layer: LayerLayout, gains: LayerGains) -> float:
    """Return what a layout loses, written out."""
    total = 0.0
    for part, left, rounding in (
        (layer.v, gains.v, gains.rounding.v),
        (layer.k_nope, gains.k_nope, gains.rounding.k_nope),
    ):
        if part.width or part is layer.k_nope:
            total += left[part.groups][part.width]
            total += relative_error(part) * rounding[part.groups][part.width]
    if gains.k_rotary:
        part, curves = layer.k_rotary, gains.k_rotary[layer.k_rotary.groups]
        counts = [part.frequencies.count(f) for f in range(len(curves))]
        total += sum(curve[m] for curve, m in zip(curves, counts, strict=True))
        total += relative_error(part) * gains.rounding.rotary(part.groups, counts)
    return total


def bits_of(layer: LayerLayout) -> int:
    return sum(bits_per_token(part) for part in layer.parts)


@pytest.mark.parametrize("shape", [TINY, WHOLE], ids=lambda s: s.family)
def test_no_pair_of_options_loses_less(shape: ModelShape) -> None:
    """Every width and number of bits of every part of one layer, by exhaustion."""
    one = replace(shape, layers=1)
    gains = gains_of(one)[:1]
    every = list(_every_layout(one, gains[0], groups=1))
    for budget in (150, 220, 300, 450, 700):
        choices = Choices((1,), (1,), BITS, BITS, BITS)
        found = spend(one, gains, budget, choices)
        assert found is not None
        least = min(lost(layer, gains[0]) for layer in every if bits_of(layer) <= budget)
        assert bits_of(found.layers[0]) <= budget
        assert found.loss == pytest.approx(least, rel=1e-9)
        assert found.loss == pytest.approx(lost(found.layers[0], gains[0]))


def _every_layout(shape: ModelShape, gains: LayerGains, groups: int) -> list[LayerLayout]:
    from vdcompress.allocate import Keys, widths

    def sizes(full: int) -> list[tuple[int, int]]:
        return [*itertools.product(widths(full), BITS)]

    values = [packed(Part(groups, w), b) for w, b in sizes(len(gains.v[groups]) - 1)]
    still = [(0, 16), *sizes(len(gains.k_nope[groups]) - 1)]
    if not gains.k_rotary:
        behind = NopePart(groups, 0, maps="per_head", after_rope=True)
        nothing = RotaryPart(groups, 0, maps="per_head")
        keys = [(packed(replace(behind, width=w), b), nothing) for w, b in still if w]
        return [LayerLayout(v, *k) for v, k in itertools.product(values, keys)]
    splits = Keys(gains, groups)
    turned = [
        packed(RotaryPart(groups, 2 * p, frequencies=splits.rotary(p)[0]), b, ROTARY_DEFAULTS)
        for p, b in itertools.product(range(0, splits.pairs + 1, 4), BITS)
    ]
    nopes = [packed(NopePart(groups, w), b) for w, b in still]
    rows = itertools.product(values, nopes, turned)
    return [LayerLayout(v, n, r) for v, n, r in rows if n.width or r.width]


def test_more_bytes_never_lose_more() -> None:
    gains, before = gains_of(TINY), math.inf
    for budget in range(200, 2200, 100):
        found = spend(TINY, gains, budget, Choices((1, 2), (1, 2), BITS, BITS, BITS))
        assert found is not None
        assert found.loss <= before + 1e-12
        assert sum(map(bits_of, found.layers)) <= budget
        before = found.loss


def test_layers_that_are_alike_have_the_same_widths_and_bits() -> None:
    gains = gains_of(TINY)
    alike = spend(TINY, gains, 700, Choices((1, 2), (1, 2), BITS, BITS, BITS, by_layer=False))
    free = spend(TINY, gains, 700, Choices((1, 2), (1, 2), BITS, BITS, BITS))
    assert alike is not None
    assert free is not None
    seen = {tuple((p.groups, p.width, p.bits) for p in layer.parts) for layer in alike.layers}
    assert len(seen) == 1
    assert free.loss <= alike.loss
    assert alike.loss == pytest.approx(sum(map(lost, alike.layers, gains)))


def test_what_is_predicted_is_what_was_spent_by() -> None:
    gains = gains_of(TINY)
    found = spend(TINY, gains, 600, Choices((1, 2), (1, 2), BITS, BITS, BITS))
    assert found is not None
    predicted = sum(sum(layer.values()) for layer in predicted_loss(found.layers, gains))
    assert predicted == pytest.approx(found.loss, rel=1e-9)


def test_nothing_fits_a_budget_below_the_narrowest() -> None:
    assert spend(TINY, gains_of(TINY), 10, Choices((1,), (1,), BITS, BITS, BITS)) is None


def test_only_the_bits_that_may_be_chosen_are() -> None:
    found = spend(TINY, gains_of(TINY), 600, Choices((1,), (1,), (4,), (8, 16), (8, 16)))
    assert found is not None
    assert {layer.v.bits for layer in found.layers} == {4}
    kept = (p for layer in found.layers for p in (layer.k_nope, layer.k_rotary) if p.width)
    assert {part.bits for part in kept} <= {8, 16}


@pytest.mark.parametrize(("width", "bits"), [*itertools.product((8, 40, 64, 192, 320), BITS)])
def test_sizes_are_the_plans(width: int, bits: int) -> None:
    part = packed(Part(2, width), bits)
    shape = replace(TINY, layers=1, head_dim=width)
    rest = NopePart(2, 8), RotaryPart(2, 0)
    plan = Plan(shape, (LayerLayout(part, *rest),))
    bare = 2 * 2 * 8
    assert plan.cache_bytes(2048) - 2048 * bare == 2048 * bits_per_token(part) // 8


def test_errors_fall_fourfold_by_bit() -> None:
    whole, eight, four, three, two = (
        relative_error(packed(Part(1, 64), bits)) for bits in (16, 8, 4, 3, 2)
    )
    assert whole == 0.0
    assert 150 < four / eight < 400
    assert 2 < three / four < 5
    assert 2 < two / three < 5
    assert two < 0.15


def test_options_that_are_beaten_are_left_out() -> None:
    rows = [Option(8, 3.0, ()), Option(16, 3.0, ()), Option(16, 2.0, ()), Option(24, 2.5, ())]
    assert thinned(rows) == [rows[0], rows[2]]


def test_exact_tokens_are_paid_for() -> None:
    """2048 tokens of a plan from a budget need no more bytes than the budget says."""
    from vdcompress.plan import plan_for
    from vdcompress.request import Request

    gains = gains_of(TINY)
    for asked in (
        Request(kv_budget=0.3, bits="auto", sinks=4, window=64),
        Request(kv_budget=0.4, bits=4),
        Request(kv_budget=0.4, v_bits=4, k_bits=8, allocation="uniform"),
        Request(kv_budget=0.2, bits="auto", v_groups=1, k_groups=1),
    ):
        plan = plan_for(TINY, asked, gains=gains)
        assert plan.bytes_per_token <= asked.kv_budget * plan.base_bytes_per_token
        assert plan.packed
    assert (plan.sinks, plan.window) == (4, 16)


def test_bits_of_a_budget_are_those_that_are_named() -> None:
    from vdcompress.errors import PlanError
    from vdcompress.plan import plan_for
    from vdcompress.request import Request

    gains = gains_of(TINY)
    plan = plan_for(TINY, Request(kv_budget=0.5, v_bits=4, k_bits=8), gains=gains)
    assert {layer.v.bits for layer in plan.layers} == {4}
    assert {layer.k_nope.bits for layer in plan.layers if layer.k_nope.width} == {8}
    with pytest.raises(PlanError, match="bits auto needs a kv_budget"):
        plan_for(TINY, Request(v_dim=16, bits="auto"), gains=gains)
    dear = Request(kv_budget=0.3, bits=8, v_groups=2, k_groups=2)
    with pytest.raises(PlanError, match="too few bytes for these bits"):
        plan_for(TINY, dear, gains=gains)
