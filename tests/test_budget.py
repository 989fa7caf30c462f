"""Plans from calibrated gains: budgets, allocation over layers, targets."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from synthetic import model_gains
from vdcompress.allocate import predicted_loss
from vdcompress.errors import PlanError
from vdcompress.gains import LayerGains
from vdcompress.plan import ModelShape, Plan, plan_for
from vdcompress.request import Request

NEOX = ModelShape("gpt_neox", layers=3, hidden=64, heads=4, kv_heads=4, head_dim=32, rotary_dim=8)
LLAMA = ModelShape("llama", layers=3, hidden=128, heads=8, kv_heads=2, head_dim=32, rotary_dim=32)
SHAPES = pytest.mark.parametrize("shape", [NEOX, LLAMA], ids=lambda shape: shape.family)


def planned(shape: ModelShape, seed: int = 0, **values: Any) -> Plan:
    return plan_for(shape, Request.of(**values), gains=model_gains(shape, seed))


def loss(plan: Plan, seed: int = 0) -> float:
    found = predicted_loss(plan.layers, model_gains(plan.shape, seed))
    return sum(part for layer in found for part in layer.values())


@SHAPES
@pytest.mark.parametrize("allocation", ["layers", "uniform"])
@pytest.mark.parametrize("seed", range(3))
def test_a_budget_is_kept_and_more_of_it_never_loses_more(
    shape: ModelShape, allocation: str, seed: int
) -> None:
    before = float("inf")
    for percent in range(15, 101, 5):
        plan = planned(shape, seed, kv_budget=percent / 100, allocation=allocation)
        assert plan.bytes_per_token <= plan.base_bytes_per_token * percent / 100
        assert loss(plan, seed) <= before + 1e-12
        before = loss(plan, seed)
        for layer in plan.layers:
            assert layer.k_head_dim % 8 == layer.v_head_dim % 8 == 0
        if allocation == "uniform":
            assert plan.common(lambda la: (la.v_head_dim, la.k_head_dim)) is not None


@SHAPES
def test_the_whole_budget_is_the_base(shape: ModelShape) -> None:
    assert planned(shape, kv_budget=1.0).layers == (shape.full_layout(),) * shape.layers


@SHAPES
def test_freedom_never_loses(shape: ModelShape) -> None:
    """Layers lose no more than uniform widths, free groups no more than fixed ones."""
    free = loss(planned(shape, kv_budget=0.5))
    assert free <= loss(planned(shape, kv_budget=0.5, allocation="uniform"))
    assert free <= loss(planned(shape, kv_budget=0.5, groups=2))
    assert free <= loss(planned(shape, kv_budget=0.5, target="vllm"))
    assert planned(shape, kv_budget=0.5, v_groups=2).layers[0].v_groups == 2


@SHAPES
def test_allocation_over_layers_keeps_the_bytes_of_each_side(shape: ModelShape) -> None:
    even = shape.kv_dim // 2
    uniform = planned(shape, v_dim=even, k_dim=even, groups=1)
    layers = planned(shape, v_dim=even, k_dim=even, groups=1, allocation="layers")
    for side in ("v_dim", "k_dim"):
        total = [sum(getattr(la, side) for la in plan.layers) for plan in (uniform, layers)]
        assert total[0] == total[1] == even * shape.layers
    assert layers.common(lambda la: (la.v_dim, la.k_dim)) is None
    assert loss(layers) < loss(uniform)
    assert layers.to_json()["v_dim"] is None


def test_shared_keys_choose_their_frequencies_layer_by_layer() -> None:
    plan = planned(NEOX, k_dim=64, groups=1)
    assert plan.common(lambda la: la.k_head_dim) == 64
    assert plan.common(lambda la: la.k_rotary) is None
    explicit = planned(NEOX, k_dim=64, groups=1, k_rotary_dim=24)
    assert {layer.k_rotary.width for layer in explicit.layers} == {24}
    assert loss(plan) <= loss(explicit)


def test_keys_that_are_narrower_than_their_rotary_part() -> None:
    plan = planned(replace(NEOX, rotary_dim=16), k_dim=32)
    assert {layer.k_head_dim for layer in plan.layers} == {8}


def test_vllm_gets_one_layout_of_equal_sides() -> None:
    plan = planned(NEOX, kv_budget=0.5, target="vllm")
    found = plan.common(lambda la: (la.v_groups, la.k_groups, la.v_head_dim, la.k_head_dim))
    assert found is not None
    assert found[0] == found[1]
    assert found[2] == found[3]


def test_vllm_prefers_widths_that_its_main_backend_takes() -> None:
    wide = ModelShape("gpt_neox", 1, 512, 8, 8, 64, 16)
    layer = planned(wide, kv_budget=0.75, target="vllm").layers[0]
    assert layer.v_head_dim <= 256


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"kv_budget": 0.0}, "not above 0"),
        ({"kv_budget": 1.5}, "not above 0 and at most 1"),
        ({"kv_budget": 0.5, "v_dim": 64}, "kv_budget excludes v_dim"),
        ({"kv_budget": 0.5, "k_rotary_dim": 8}, "kv_budget excludes k_rotary_dim"),
        ({"kv_budget": 0.5, "allocation": "random"}, "allocation 'random' is none of"),
        ({"kv_budget": 0.5, "target": "llama.cpp"}, "target 'llama.cpp' is none of"),
        ({"kv_budget": 0.5, "target": "vllm", "allocation": "layers"}, "one layout for all"),
        ({"kv_budget": 0.5, "target": "vllm", "v_groups": 1, "k_groups": 4}, "one number of"),
        ({"v_dim": 64, "target": "vllm"}, "K and V of one width, not 128 and 64"),
        ({"v_dim": 64, "k_dim": 64, "v_groups": 1, "target": "vllm"}, "one number of groups"),
        ({"kv_budget": 0.01}, "too few"),
        ({"v_dim": 8, "allocation": "layers"}, "v_dim is too narrow to differ"),
    ],
)
def test_what_cannot_be_is_refused(values: dict[str, Any], reason: str) -> None:
    with pytest.raises(PlanError) as caught:
        planned(NEOX, **values)
    assert reason in caught.value.message


def test_vllm_refuses_widths_that_none_of_its_backends_takes() -> None:
    with pytest.raises(PlanError, match="no backend of vLLM takes this plan") as caught:
        planned(NEOX, v_dim=16 + 4, k_dim=16 + 4, groups=1, target="vllm")
    assert "TRITON_ATTN" in caught.value.hint


def test_gains_must_be_there_and_fit() -> None:
    for values in ({"kv_budget": 0.5}, {"v_dim": 64, "allocation": "layers"}):
        with pytest.raises(PlanError, match="needs calibrated gains"):
            plan_for(NEOX, Request(**values))
    gains = model_gains(NEOX)
    with pytest.raises(PlanError, match="gains of 2 layers, the model has 3"):
        plan_for(NEOX, Request(kv_budget=0.5), gains=gains[:2])
    few = [LayerGains({1: g.v[1]}, {1: g.k_nope[1]}, {1: g.k_rotary[1]}) for g in gains]
    with pytest.raises(PlanError, match="nothing for 4 groups"):
        plan_for(NEOX, Request(v_dim=64, allocation="layers"), gains=few)
    assert plan_for(NEOX, Request(kv_budget=0.5, v_groups=1, k_groups=1), gains=few)


@pytest.mark.parametrize(
    ("values", "needs"),
    [
        ({"v_dim": 64}, False),
        ({"v_dim": 64, "v_groups": 1}, False),
        ({"k_dim": 64}, False),
        ({"k_dim": 128, "k_groups": 1}, False),
        ({"k_dim": 64, "k_groups": 1}, True),
        ({"k_dim": 64, "k_groups": 1, "k_rotary_dim": 0}, False),
        ({"k_dim": 64, "k_groups": 1, "k_rotary_dim": 32}, False),
        ({"k_dim": 64, "k_groups": 1, "k_rotary_dim": 16}, True),
        ({"k_dim": 16}, True),
        ({"v_dim": 64, "allocation": "layers"}, True),
        ({"kv_budget": 0.5}, True),
    ],
)
def test_which_requests_need_gains(values: dict[str, Any], needs: bool) -> None:
    asked = Request(**values)
    assert asked.needs_gains(NEOX) is needs
    if not needs:
        assert plan_for(NEOX, asked) == plan_for(NEOX, asked, gains=model_gains(NEOX))


def test_whole_rotary_heads_need_gains_for_allocation_only() -> None:
    assert not Request(k_dim=32, k_groups=1).needs_gains(LLAMA)
    assert Request(k_dim=32, allocation="layers").needs_gains(LLAMA)


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"v_dim": 320}, "v320"),
        ({"v_dim": 320, "k_dim": 320}, "v320-k320"),
        ({"v_dim": 192, "k_dim": 192, "groups": 1}, "g1-v192-k192"),
        ({"v_dim": 320, "groups": 1}, "g1-v320"),
        ({"v_dim": 320, "k_dim": 320, "v_groups": 1}, "vg1-v320-k320"),
        ({"v_dim": 320, "k_dim": 64, "v_groups": 1, "k_groups": 2}, "vg1-kg2-v320-k64"),
        ({"k_dim": 64, "groups": 1, "k_rotary_dim": 16}, "g1-k64-r16"),
        ({"kv_budget": 0.5}, "kv0.5"),
        ({"kv_budget": 0.5, "target": "vllm"}, "kv0.5-vllm"),
        ({"kv_budget": 0.5, "allocation": "uniform"}, "kv0.5-uniform"),
        ({"kv_budget": 0.5, "allocation": "layers"}, "kv0.5"),
        ({"v_dim": 320, "allocation": "layers"}, "v320-layers"),
    ],
)
def test_runs_are_named_after_what_was_asked(values: dict[str, Any], name: str) -> None:
    assert Request.of(**values).label() == name
