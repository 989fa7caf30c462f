"""Allocation beside exhaustive search: how close it comes, and that it keeps to the budget."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace

import pytest

from synthetic import falling, layer_gains, model_gains
from vdcompress.allocate import (
    Curve,
    Keys,
    allocate,
    key_curve,
    predicted_loss,
    total,
    value_curve,
    widths,
)
from vdcompress.modeling.layout import LayerLayout, NopePart, Part, RotaryPart
from vdcompress.plan import ModelShape

SMALL = ModelShape("gpt_neox", layers=3, hidden=64, heads=4, kv_heads=4, head_dim=16, rotary_dim=4)
NEOX = ModelShape("gpt_neox", layers=2, hidden=512, heads=8, kv_heads=8, head_dim=64, rotary_dim=16)
WHOLE = ModelShape("llama", layers=2, hidden=64, heads=4, kv_heads=2, head_dim=16, rotary_dim=16)


def size(curves: list[Curve], chosen: tuple[int, ...]) -> int:
    return sum(curve.sizes[index] for curve, index in zip(curves, chosen, strict=True))


def loss(curves: list[Curve], chosen: tuple[int, ...]) -> float:
    return sum(curve.losses[index] for curve, index in zip(curves, chosen, strict=True))


def optimum(curves: list[Curve], budget: int) -> float:
    """Return the least loss of all choices, by following every sum of sizes."""
    reached = {0: 0.0}
    for curve in curves:
        further: dict[int, float] = {}
        for (used, lost), (more, left) in itertools.product(
            reached.items(), zip(curve.sizes, curve.losses, strict=True)
        ):
            if used + more <= budget:
                further[used + more] = min(further.get(used + more, math.inf), lost + left)
        reached = further
    return min(reached.values())


def sides(shape: ModelShape, v_groups: int, k_groups: int, seed: int) -> list[Curve]:
    gains = model_gains(shape, seed)
    keys = [key_curve(layer, k_groups) for layer in gains]
    return [*(value_curve(layer, v_groups) for layer in gains), *keys]


@pytest.mark.parametrize("groups", [*itertools.product((1, 2, 4), repeat=2)])
def test_every_budget_of_a_small_model_is_spent_best(groups: tuple[int, int]) -> None:
    for seed in range(3):
        curves = sides(SMALL, *groups, seed)
        least, most = (sum(curve.sizes[end] for curve in curves) for end in (0, -1))
        before = math.inf
        for budget in range(least, most + 9, 8):
            chosen = allocate(curves, budget)
            found = loss(curves, chosen)
            assert size(curves, chosen) <= budget
            assert found <= before + 1e-12
            assert found == pytest.approx(optimum(curves, budget), rel=1e-9, abs=1e-12)
            before = found


@pytest.mark.parametrize("groups", [(1, 1), (1, 8), (8, 1), (2, 8)])
def test_many_steps_come_close_to_the_optimum(groups: tuple[int, int]) -> None:
    curves = sides(NEOX, *groups, seed=5)
    for budget in (300, 641, 1024, 1500):
        chosen = allocate(curves, budget)
        assert size(curves, chosen) <= budget
        assert loss(curves, chosen) <= 1.001 * optimum(curves, budget)


def test_curves_that_are_not_convex() -> None:
    draw = random.Random(4)
    curves = []
    for step in (8, 16, 24):
        fall = sorted((draw.random() for _ in range(9)), reverse=True)
        curves.append(Curve(tuple(step * (index + 1) for index in range(9)), tuple(fall)))
    for budget in range(48, 433, 8):
        chosen = allocate(curves, budget)
        assert size(curves, chosen) <= budget
        assert loss(curves, chosen) == pytest.approx(optimum(curves, budget))


def test_nothing_is_spent_for_nothing_and_too_little_is_refused() -> None:
    flat = Curve((8, 16, 24), (0.0, 0.0, 0.0))
    assert allocate([flat], 24) == (0,)
    assert allocate([Curve((8,), (0.0,))], 8) == (0,)
    with pytest.raises(ValueError, match="below the smallest"):
        allocate([flat], 7)


def brute(shape: ModelShape, seed: int, width: int, pairs: int | None) -> float:
    """Return the least loss of a K latent with 2 groups, over all counts of all frequencies."""
    gains = layer_gains(shape, random.Random(seed))
    nope, rotary = gains.k_nope[2], gains.k_rotary[2]
    best = math.inf
    for counts in itertools.product(*(range(len(curve)) for curve in rotary)):
        rest = width - 2 * sum(counts)
        if 0 <= rest < len(nope) and pairs in (None, sum(counts)):
            kept = sum(curve[count] for curve, count in zip(rotary, counts, strict=True))
            best = min(best, nope[rest] + kept)
    return best


@pytest.mark.parametrize("seed", range(4))
def test_a_key_is_split_at_its_best(seed: int) -> None:
    shape = replace(SMALL, rotary_dim=6)
    keys = Keys(layer_gains(shape, random.Random(seed)), groups=2)
    assert keys.full == 2 * 16
    for width in range(1, keys.full + 1):
        split = keys.best(width)
        assert split.nope + 2 * len(split.frequencies) == width
        assert list(split.frequencies) == sorted(split.frequencies)
        assert split.loss == pytest.approx(brute(shape, seed, width, None), abs=1e-12)
    fixed = keys.best(16, pairs=3)
    assert len(fixed.frequencies) == 3
    assert fixed.loss == pytest.approx(brute(shape, seed, 16, 3), abs=1e-12)


def test_a_whole_key_leaves_nothing_out() -> None:
    keys = Keys(layer_gains(SMALL, random.Random(0)), groups=4)
    assert keys.best(16).frequencies == (0, 1)
    assert keys.best(16).loss == 0


def test_whole_rotary_heads_have_nothing_to_split() -> None:
    keys = Keys(layer_gains(WHOLE, random.Random(0)), groups=1)
    assert keys.full == 32
    assert keys.best(24).nope == 24
    assert keys.best(24).frequencies == ()


def test_widths_are_steps_of_eight_and_all() -> None:
    assert widths(32) == (8, 16, 24, 32)
    assert widths(20) == (8, 16, 20)
    assert widths(6) == (6,)


def test_fixed_pairs_bound_the_widths() -> None:
    gains = layer_gains(SMALL, random.Random(0))
    assert key_curve(gains, 1, pairs=8).sizes == (16, 24, 32, 40, 48, 56, 64)
    assert key_curve(gains, 1, pairs=0).sizes == (8, 16, 24, 32, 40, 48)


def test_one_width_for_all_layers_is_a_sum() -> None:
    both = total([Curve((8, 16), (3.0, 1.0)), Curve((8, 16), (5.0, 0.0))])
    assert both == Curve((16, 32), (8.0, 1.0))


def test_predicted_loss_reads_every_part() -> None:
    gains = layer_gains(SMALL, random.Random(1))
    layer = LayerLayout(Part(2, 8), NopePart(1, 10), RotaryPart(1, 6, frequencies=(0, 1, 1)))
    (found,) = predicted_loss([layer], [gains])
    assert found == {
        "v": gains.v[2][8],
        "k_nope": gains.k_nope[1][10],
        "k_rotary": gains.k_rotary[1][0][1] + gains.k_rotary[1][1][2],
    }


@pytest.mark.parametrize("shape", [SMALL, WHOLE])
def test_the_base_is_predicted_to_lose_nothing(shape: ModelShape) -> None:
    gains = model_gains(shape)
    found = predicted_loss((shape.full_layout(),) * shape.layers, gains)
    assert all(part == 0 for layer in found for part in layer.values())


def test_synthetic_gains_are_convex() -> None:
    losses = falling(random.Random(0), 9)
    falls = [a - b for a, b in itertools.pairwise(losses)]
    assert losses[-1] == 0
    assert falls == sorted(falls, reverse=True)
