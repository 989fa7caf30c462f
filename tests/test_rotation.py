"""Rotations that are folded into weights change nothing but the numbers that the cache holds."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from drawn import make_keys, make_layer
from vdcompress.latents.keys import (
    KeyMetric,
    keep_centred_keys,
    keep_keys_behind_rope,
    solve_keys,
)
from vdcompress.latents.lowrank import block_diagonal
from vdcompress.latents.rotation import Basis, hadamard, rotates, rotation, turn_keys, turn_values
from vdcompress.latents.rounding_basis import key_basis, value_basis
from vdcompress.latents.values import fold, keep_centred, map_per_head
from vdcompress.modeling.layout import LayerLayout, NopePart, Part, RotaryPart
from vdcompress.modeling.quantizers import quantizer
from vdcompress.modeling.rope import rotate
from vdcompress.plan import ModelShape

EXACT = {"atol": 1e-9, "rtol": 1e-9}
PACKED: dict[str, Any] = {"bits": 4, "quantizer": "per_token"}
NEOX = ModelShape("gpt_neox", 1, 48, 4, 4, 12, 4)
LLAMA = ModelShape("llama", 1, 48, 4, 2, 12, 12)


def draw() -> torch.Generator:
    return torch.Generator().manual_seed(3)


@pytest.mark.parametrize("size", [1, 2, 7, 8, 12, 40, 48, 64, 192, 320])
def test_rotations_are_orthogonal_and_mix_everything(size: int) -> None:
    turn = rotation(size, draw())
    same = torch.eye(size, dtype=torch.float64)
    torch.testing.assert_close(turn @ turn.mT, same, atol=1e-13, rtol=0)
    if size > 1:
        assert turn.abs().max() < 1
        assert (turn != 0).all()
    assert torch.equal(turn, rotation(size, draw()))


def test_hadamard_is_sylvesters() -> None:
    expected = torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2
    torch.testing.assert_close(hadamard(4), expected.double())


def test_only_parts_whose_tokens_have_scales_of_their_own_are_rotated() -> None:
    assert rotates(Part(1, 8, **PACKED))
    assert not rotates(Part(1, 8))
    assert not rotates(Part(1, 8, bits=4, quantizer="per_channel"))


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("combine", [fold, map_per_head])
def test_values_are_read_as_before(groups: int, combine: Any) -> None:
    layer = make_layer(latents=groups)
    problem = layer.problem
    weights = combine(problem, keep_centred(problem))
    width = problem.v_weight.shape[1]
    basis = value_basis(problem, weights, draw())
    turned = turn_values(weights, Part(groups, width, **PACKED), basis)
    assert (turned.v_weight - weights.v_weight).abs().max() > 1e-3

    def outputs(w: Any) -> torch.Tensor:
        latents = (layer.inputs @ w.v_weight.mT + w.v_bias).unflatten(-1, (groups, width))
        heads = latents.repeat_interleave(problem.sharing, dim=1)  # a head that sees this token
        if w.o_contract is not None:
            heads = torch.einsum("nhr,hrd->nhd", heads, w.o_contract)
        return heads.flatten(1) @ w.o_weight.mT + w.o_bias

    torch.testing.assert_close(outputs(turned), outputs(weights), **EXACT)
    kv_heads = layer.values.repeat_interleave(problem.o_weight.shape[0] // 4, dim=1)
    base = torch.einsum("nhd,hyd->ny", kv_heads, problem.o_weight) + problem.o_bias
    torch.testing.assert_close(outputs(weights), base, **EXACT)  # the folded mean is exact


@pytest.mark.parametrize("measured", [True, False])
def test_values_are_balanced_by_gradients_where_those_are_known(measured: bool) -> None:
    """At full width z = v: what is stored and what weighs its errors become one, but for scale."""
    problem = make_layer(latents=4).problem
    if not measured:
        statistics = replace(problem.statistics, value_gradients=None)
        problem = replace(problem, statistics=statistics)
    basis = value_basis(problem, fold(problem, keep_centred(problem)), draw())
    seen = problem.statistics.value_gradients
    gram = (problem.o_weight.mT @ problem.o_weight).unflatten(0, (4, -1)).sum(1)
    reading = gram if seen is None else seen.blocks(4).second

    stored = basis.turn @ problem.values().covariance @ basis.turn.mT
    weighed = basis.back.mT @ reading @ basis.back
    by_trace = [found / trace(found) for found in (weighed, stored)]
    torch.testing.assert_close(*by_trace, rtol=1e-6, atol=1e-9)
    volume = torch.linalg.det(basis.turn).abs()
    torch.testing.assert_close(volume, torch.ones_like(volume))


def trace(found: torch.Tensor) -> torch.Tensor:
    return found.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]


def layout_of(name: str) -> tuple[ModelShape, LayerLayout]:
    four = tuple(range(2))
    if name == "whole heads":
        nope, rotary = NopePart(4, 8, **PACKED), RotaryPart(4, 4, frequencies=four, **PACKED)
        return NEOX, LayerLayout(Part(4, 12), nope, rotary)
    if name == "shared":
        nope = NopePart(1, 12, **PACKED)
        return NEOX, LayerLayout(
            Part(4, 12), nope, RotaryPart(1, 12, frequencies=(0, 0, 0, 1, 1, 1), **PACKED)
        )
    if name == "shared, maps per head":
        layout = layout_of("shared")[1]
        return NEOX, replace(
            layout,
            k_nope=replace(layout.k_nope, maps="per_head"),
            k_rotary=replace(layout.k_rotary, maps="per_head"),
        )
    width, groups = (12, 2) if name == "whole heads behind RoPE" else (16, 1)
    nope = NopePart(groups, width, maps="per_head", after_rope=True, **PACKED)
    return LLAMA, LayerLayout(Part(2, 12), nope, RotaryPart(groups, 0, maps="per_head"))


NAMES = (
    "whole heads",
    "shared",
    "shared, maps per head",
    "whole heads behind RoPE",
    "shared behind RoPE",
)


@pytest.mark.parametrize("name", NAMES)
def test_scores_are_as_before(name: str) -> None:
    shape, layout = layout_of(name)
    keys = make_keys(shape, layout, tokens=400, shift=2.0)
    problem = keys.problem
    if name == "whole heads":
        weights = keep_centred_keys(problem)
    elif name == "whole heads behind RoPE":
        weights = keep_keys_behind_rope(problem)
    else:
        weights = solve_keys(problem, keys.metric)
    basis = key_basis(problem, keys.metric, weights, draw())
    turned = turn_keys(weights, layout, basis)

    def scores(w: Any) -> torch.Tensor:
        angles = keys.positions[:, None] * keys.frequencies
        cos, sin = angles.cos()[None], angles.sin()[None]
        q = (keys.inputs.roll(3, dims=0) @ w.q_weight.mT + w.q_bias).unflatten(
            -1, (shape.heads, -1)
        )
        q = q.transpose(0, 1)[None]
        k = keys.inputs @ w.k_weight.mT + w.k_bias
        if w.k_compress is not None:
            k = rotate(k.unflatten(-1, (shape.kv_heads, -1)).transpose(0, 1)[None], cos, sin)
            joined = k.unflatten(1, (layout.k_groups, -1)).transpose(2, 3).flatten(-2)
            k = joined @ w.k_compress + w.k_shift
            q = rotate(q, cos, sin) @ w.q_expand
        else:
            kept = list(layout.k_rotary.frequencies)
            cos, sin = cos[..., kept], sin[..., kept]
            k = k.unflatten(-1, (layout.k_groups, -1)).transpose(0, 1)[None]
            q = q if w.q_expand is None else q @ w.q_expand
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        return q @ k.repeat_interleave(shape.heads // layout.k_groups, dim=1).mT

    found, expected = scores(turned), scores(weights)
    torch.testing.assert_close(found, expected, **EXACT)
    if name.startswith("whole heads"):
        sharing = shape.heads // shape.kv_heads
        k = keys.keys.transpose(0, 1).repeat_interleave(sharing, dim=0)
        base = (keys.queries.transpose(0, 1) @ k.mT)[None]
        shift = (found - base)[..., :1]  # the softmax does not see one number per query
        torch.testing.assert_close(found - shift, base, atol=1e-8, rtol=1e-8)


def test_rotary_pairs_are_mixed_within_a_frequency_only() -> None:
    shape, layout = layout_of("shared")
    keys = make_keys(shape, layout, tokens=400)
    weights = solve_keys(keys.problem, keys.metric)
    turn = key_basis(keys.problem, keys.metric, weights, draw()).turn[0]
    torch.testing.assert_close(turn[:6, :6], turn[6:12, 6:12])
    torch.testing.assert_close(turn[:6, 6:12], -turn[6:12, :6])
    assert not turn[:12, 12:].any()
    for rows in (slice(0, 6), slice(6, 12)):
        block = turn[rows, :6]
        assert not block[:3, 3:].any()
        assert (block[:3, :3] != 0).all()


def rounding_loss(keys: Any, weights: Any, layout: LayerLayout) -> float:
    """Weighed error of scores when keys are rounded by the layout's quantiser."""
    problem, still = keys.problem, slice(layout.k_rotary.width, None)
    latents = keys.inputs @ weights.k_weight.mT + weights.k_bias
    latents = latents.unflatten(-1, (layout.k_groups, -1))[..., still].transpose(0, 1)
    error = quantizer("per_token", 4).read_back(latents) - latents
    heads = len(problem.q_weight)
    queries = keys.inputs.roll(3, dims=0) @ weights.q_weight.mT + weights.q_bias
    queries = queries.unflatten(-1, (heads, -1))[..., still].transpose(0, 1)
    error = error.repeat_interleave(heads // layout.k_groups, dim=0)
    return float((queries[:, :200] @ error.mT).square().mean())


def test_rounding_hurts_least_in_the_balanced_basis() -> None:
    nope = NopePart(1, 24, **PACKED)
    layout = LayerLayout(Part(4, 12), nope, RotaryPart(1, 16, frequencies=(0,) * 4 + (1,) * 4))
    keys = make_keys(NEOX, layout, tokens=2000)
    met = keys.problem.statistics.require("queries").second
    metric = KeyMetric(block_diagonal(met, 1), keys.metric.keys)
    weights = solve_keys(keys.problem, metric)
    balanced = turn_keys(weights, layout, key_basis(keys.problem, metric, weights, draw()))
    mix = torch.block_diag(torch.eye(16, dtype=torch.float64), rotation(24, draw()))[None]
    rotated = turn_keys(weights, layout, Basis(mix, mix.mT))
    losses = [rounding_loss(keys, found, layout) for found in (balanced, rotated)]
    assert losses[0] < 0.9 * losses[1]
