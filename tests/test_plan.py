"""Plans: what they refuse, what they cost, and that they survive JSON."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from vdcompress.errors import PlanError
from vdcompress.modeling.layout import LayerLayout, NopePart, Part, RotaryPart, problems
from vdcompress.plan import ModelShape, Plan, Start, make_plan, width_warnings

NEOX = ModelShape("gpt_neox", layers=6, hidden=512, heads=8, kv_heads=8, head_dim=64, rotary_dim=16)
LLAMA = ModelShape("llama", layers=4, hidden=512, heads=8, kv_heads=2, head_dim=64, rotary_dim=64)
NO_PAIRS = RotaryPart(8, 0)


def neox_layer(**changes: Any) -> LayerLayout:
    return dataclasses.replace(NEOX.full_layout(), **changes)


LAYOUTS = {
    "narrow": neox_layer(v=Part(8, 40)),
    "shared": neox_layer(v=Part(1, 192, maps="per_head")),
    "multi_query": LayerLayout(
        Part(1, 192),
        NopePart(1, 160),
        RotaryPart(1, 32, frequencies=(0, 0, *range(1, 8), *[7] * 7)),
    ),
    "few_frequencies": neox_layer(k_rotary=RotaryPart(8, 6, frequencies=(0, 2, 5))),
    "no_rotary": neox_layer(k_rotary=NO_PAIRS),
    "after_rope": neox_layer(
        k_nope=NopePart(4, 24, maps="per_head", after_rope=True), k_rotary=RotaryPart(4, 0)
    ),
    "low_bits": neox_layer(v=Part(8, 40, bits=4, quantizer="per_token")),
}


@pytest.mark.parametrize("shape", [NEOX, LLAMA])
def test_full_width_is_the_base(shape: ModelShape) -> None:
    plan = make_plan(shape, v_dim=shape.kv_dim)
    assert plan.layers == (shape.full_layout(),) * shape.layers
    assert plan.reduction == 0
    assert plan.bytes_per_token == plan.base_bytes_per_token


def test_the_original_experiment() -> None:
    plan = make_plan(NEOX, v_dim=320)
    assert [layer.v for layer in plan.layers] == [Part(8, 40)] * 6
    assert plan.base_bytes_per_token == 12288
    assert plan.bytes_per_token == 9984
    assert plan.reduction == 0.1875


@pytest.mark.parametrize(
    ("dtype", "size"), [("float32", 4), ("float16", 2), ("bfloat16", 2)], ids=str
)
def test_cache_bytes_are_a_sum_over_layers(dtype: str, size: int) -> None:
    layers = (LAYOUTS["narrow"], LAYOUTS["shared"], LAYOUTS["few_frequencies"])
    plan = Plan(dataclasses.replace(NEOX, layers=3), layers)
    numbers = (8 * 40 + 8 * 64) + (192 + 8 * 64) + (8 * 64 + 8 * (48 + 6))
    assert plan.cache_bytes(100, dtype) == 100 * numbers * size


@pytest.mark.parametrize("name", LAYOUTS)
def test_json_both_ways(name: str) -> None:
    plan = Plan(NEOX, (LAYOUTS[name],) * 6, Start("pca", "none", 0, seed=7))
    assert Plan.from_json(json.loads(plan.dumps())) == plan


def test_scalars_are_null_where_layers_differ() -> None:
    mixed = Plan(NEOX, (LAYOUTS["narrow"],) * 5 + (LAYOUTS["shared"],)).to_json()
    assert mixed["v_dim"] is None
    assert mixed["v_groups"] is None
    assert mixed["k_dim"] == 512
    uniform = make_plan(NEOX, v_dim=320).to_json()
    assert (uniform["v_dim"], uniform["k_dim"]) == (320, 512)
    assert (uniform["v_groups"], uniform["k_groups"]) == (8, 8)
    assert (uniform["v_bits"], uniform["k_bits"]) == (16, 16)


@pytest.mark.parametrize(
    ("v_dim", "reasons"),
    [
        (0, ["not above zero"]),
        (-8, ["not above zero"]),
        (324, ["not divisible by 8"]),
        (520, ["above the model's 512"]),
        (-3, ["not above zero", "not divisible by 8"]),
        (1001, ["above the model's 512", "not divisible by 8"]),
    ],
)
def test_unfit_widths_are_refused_with_every_reason(v_dim: int, reasons: list[str]) -> None:
    with pytest.raises(PlanError) as caught:
        make_plan(NEOX, v_dim=v_dim)
    assert caught.value.exit_code == 2
    assert len(caught.value.problems) == len(reasons)
    for problem, reason in zip(caught.value.problems, reasons, strict=True):
        assert reason in problem
        assert reason in caught.value.message
    assert "320" in caught.value.hint


def test_widths_that_fit_llama() -> None:
    with pytest.raises(PlanError) as caught:
        make_plan(LLAMA, v_dim=81)
    assert caught.value.hint.endswith("16, 32, 48, 64, 80, 96, 112, 128")


def test_odd_widths_are_allowed_with_a_warning() -> None:
    assert width_warnings(make_plan(NEOX, v_dim=320)) == []
    (warning,) = width_warnings(make_plan(NEOX, v_dim=8 * 37))
    assert "37" in warning


@pytest.mark.parametrize("number", [0, 2, None, "1"])
def test_other_formats_are_refused(number: Any) -> None:
    data = make_plan(NEOX, v_dim=320).to_json() | {"format": number}
    with pytest.raises(PlanError, match="format") as caught:
        Plan.from_json(data)
    assert "install" in caught.value.hint


def _drop(data: dict[str, Any]) -> None:
    del data["layers"][0]["v"]


def _add(data: dict[str, Any]) -> None:
    data["layers"][0]["v"]["colour"] = "red"


def _word(data: dict[str, Any]) -> None:
    data["layers"][0]["v"]["width"] = "forty"


def _list(data: dict[str, Any]) -> None:
    data["layers"][0] = [1, 2]


def _shape(data: dict[str, Any]) -> None:
    data["shape"] = 3


def _bare(data: dict[str, Any]) -> None:
    data["start"]["warp"] = 1


@pytest.mark.parametrize("damage", [_drop, _add, _word, _list, _shape, _bare])
def test_damaged_plans_are_refused(damage: Any) -> None:
    data = json.loads(make_plan(NEOX, v_dim=320).dumps())
    damage(data)
    with pytest.raises(PlanError):
        Plan.from_json(data)


@pytest.mark.parametrize("data", [[], "plan", None])
def test_what_is_no_plan_is_refused(data: Any) -> None:
    with pytest.raises(PlanError):
        Plan.from_json(data)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (neox_layer(v=Part(3, 64)), "v.groups 3 does not divide"),
        (neox_layer(v=Part(0, 64)), "v.groups 0"),
        (neox_layer(v=Part(16, 64)), "v.groups 16 does not divide"),
        (neox_layer(v=Part(8, 0)), "no dimensions"),
        (neox_layer(v=Part(8, -8)), "v.width -8"),
        (neox_layer(k_nope=NopePart(8, -8)), "k_nope.width -8"),
        (neox_layer(v=Part(8, 40, bits=5)), "v.bits 5"),
        (neox_layer(v=Part(8, 40, bits=4)), "v.quantizer None is none of per_token"),
        (neox_layer(v=Part(8, 40, bits=8, quantizer="normal")), "v.quantizer normal does not"),
        (neox_layer(v=Part(8, 40, maps="loose")), "v.maps 'loose'"),
        (neox_layer(k_rotary=RotaryPart(8, 16, frequencies=(0, 1))), "twice its number"),
        (neox_layer(k_rotary=RotaryPart(8, 2, frequencies=(8,))), "beyond the base's 8"),
        (neox_layer(k_rotary=RotaryPart(8, 2, frequencies=(-1,))), "beyond the base's 8"),
        (neox_layer(k_nope=NopePart(4, 48)), "differ in groups"),
        (neox_layer(k_nope=NopePart(8, 48, maps="per_head")), "differ in maps"),
        (neox_layer(k_nope=NopePart(8, 0), k_rotary=NO_PAIRS), "no dimensions"),
        (neox_layer(k_nope=NopePart(8, 48, maps="per_head", after_rope=True)), "after RoPE"),
        (neox_layer(k_nope=NopePart(8, 48, after_rope=True), k_rotary=NO_PAIRS), "after RoPE"),
    ],
)
def test_unsound_layouts_are_refused(layer: LayerLayout, reason: str) -> None:
    with pytest.raises(PlanError, match=f"layer 2: .*{reason}"):
        Plan(NEOX, (NEOX.full_layout(),) * 2 + (layer,) * 4).validate()


@pytest.mark.parametrize("name", LAYOUTS)
def test_sound_layouts_are_allowed(name: str) -> None:
    assert problems(LAYOUTS[name], heads=8, kv_heads=8, frequencies=8) == []


def test_groups_of_both_sides_must_be_multiples() -> None:
    six = dataclasses.replace(NEOX, heads=6, kv_heads=6)
    layer = LayerLayout(Part(2, 8), NopePart(3, 48), RotaryPart(3, 0))
    found = problems(layer, heads=6, kv_heads=6, frequencies=8)
    assert any("3 groups on one side are not a multiple of 2" in reason for reason in found)
    with pytest.raises(PlanError):
        Plan(six, (layer,) * 6).validate()


def test_everything_wrong_is_said_at_once() -> None:
    layers = (neox_layer(v=Part(3, 64, bits=5)), neox_layer(v=Part(8, 0)))
    with pytest.raises(PlanError) as caught:
        Plan(NEOX, layers).validate()
    assert len(caught.value.problems) >= 4
    assert "2 layers, the model 6" in caught.value.message
    assert "layer 0: v.groups 3" in caught.value.message
    assert "layer 0: v.bits 5" in caught.value.message
    assert "layer 1: a latent has no dimensions" in caught.value.message


def test_plans_are_frozen_values() -> None:
    plan = make_plan(NEOX, v_dim=320)
    assert plan == make_plan(NEOX, v_dim=320)
    assert hash(plan) == hash(make_plan(NEOX, v_dim=320))
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.shape = LLAMA  # type: ignore[misc]


def test_keys_of_each_head_keep_all_that_is_rotary() -> None:
    plan = make_plan(NEOX, v_dim=320, k_dim=320)
    assert plan.reduction == 0.375
    layer = plan.common(lambda layer: layer)
    assert layer == LayerLayout(
        Part(8, 40), NopePart(8, 24), RotaryPart(8, 16, frequencies=tuple(range(8)))
    )
    scalars = plan.to_json()
    assert (scalars["k_dim"], scalars["k_rotary_dim"]) == (320, 128)


def test_keys_alone() -> None:
    plan = make_plan(NEOX, k_dim=128)
    assert plan.layers[0].v == NEOX.full_layout().v
    assert (plan.layers[0].k_nope.width, plan.layers[0].k_rotary.width) == (0, 16)


def test_keys_of_whole_rotary_heads_are_mapped_behind_rope() -> None:
    layer = make_plan(LLAMA, v_dim=80, k_dim=80).layers[0]
    assert layer.v == Part(2, 40)
    assert layer.k_nope == NopePart(2, 40, maps="per_head", after_rope=True)
    assert layer.k_rotary == RotaryPart(2, 0, maps="per_head")
    shared = make_plan(LLAMA, k_dim=96, groups=1).layers[0]
    assert shared.k_nope == NopePart(1, 96, maps="per_head", after_rope=True)
    assert shared.v == LLAMA.full_layout().v
    assert make_plan(LLAMA, k_dim=128).layers[0] == LLAMA.full_layout()


@pytest.mark.parametrize("groups", [1, 2, 4, 8])
def test_every_number_of_groups_can_keep_everything(groups: int) -> None:
    plan = make_plan(NEOX, v_dim=512, k_dim=512, groups=groups)
    assert plan.reduction == 0
    layer = plan.layers[0]
    assert (layer.v_groups, layer.v_head_dim) == (groups, 512 // groups)
    assert (layer.k_groups, layer.k_head_dim) == (groups, 512 // groups)
    counts = [layer.k_rotary.frequencies.count(index) for index in range(8)]
    assert counts == [8 // groups] * 8
    assert list(layer.k_rotary.frequencies) == sorted(layer.k_rotary.frequencies)


def test_an_even_rotary_part_needs_no_gains() -> None:
    layer = make_plan(NEOX, v_dim=192, k_dim=192, groups=1, k_rotary_dim=64).layers[0]
    assert (layer.k_nope.groups, layer.k_nope.width) == (1, 128)
    assert layer.k_rotary.frequencies == tuple(index for index in range(8) for _ in range(4))
    assert make_plan(NEOX, k_dim=64, k_rotary_dim=0).layers[0].k_rotary == RotaryPart(8, 0)


@pytest.mark.parametrize(
    "request_",
    [
        {"k_dim": 192, "groups": 1},
        {"k_dim": 64},
        {"k_dim": 192, "groups": 1, "k_rotary_dim": 48 + 2},
    ],
)
def test_a_choice_of_frequencies_needs_gains(request_: dict[str, int]) -> None:
    with pytest.raises(PlanError, match="rotary frequencies needs calibrated gains"):
        make_plan(NEOX, **request_)


@pytest.mark.parametrize(
    ("request_", "reasons", "hint"),
    [
        ({}, ["no width"], ""),
        ({"k_dim": 324}, ["k_dim 324 is not divisible by 8 key/value heads"], "--k-dim with one"),
        ({"v_dim": 320, "groups": 3}, ["v_groups 3 does not divide 8"], "groups 1, 2, 4, 8"),
        ({"v_dim": 320, "v_groups": 0}, ["v_groups 0 does not divide"], "groups 1, 2, 4, 8"),
        ({"v_dim": 320, "k_groups": 1}, ["k_groups without k_dim"], ""),
        (
            {"v_dim": 601, "k_dim": 601, "groups": 2},
            ["v_dim 601 is above", "v_dim 601 is not divisible by 2 groups", "k_dim 601", "k_dim"],
            "--v-dim with one of",
        ),
        ({"v_dim": 320, "k_rotary_dim": 16}, ["k_rotary_dim without k_dim"], ""),
        ({"k_dim": 320, "k_rotary_dim": 24}, ["not divisible by 2 times 8 groups"], ""),
        ({"k_dim": 320, "k_rotary_dim": 336}, ["not between 0 and k_dim", "above the model"], ""),
        ({"k_dim": 448, "k_rotary_dim": 48}, ["less 48 rotary ones is above the other 384"], ""),
    ],
)
def test_unfit_requests_are_refused_with_every_reason(
    request_: dict[str, int], reasons: list[str], hint: str
) -> None:
    with pytest.raises(PlanError) as caught:
        make_plan(NEOX, **request_)
    assert len(caught.value.problems) == len(reasons)
    for problem, reason in zip(caught.value.problems, reasons, strict=True):
        assert reason in problem
    assert hint in caught.value.hint


def test_groups_of_which_neither_is_a_multiple() -> None:
    six = dataclasses.replace(NEOX, heads=6, kv_heads=6)
    with pytest.raises(PlanError, match="3 groups of V and 2 of K"):
        make_plan(six, v_dim=96, k_dim=96, v_groups=3, k_groups=2)


def test_whole_rotary_heads_have_no_rotary_part_to_ask_for() -> None:
    with pytest.raises(PlanError, match="RoPE rotates whole heads"):
        make_plan(LLAMA, k_dim=80, k_rotary_dim=16)


def test_narrow_keys_are_allowed_with_a_warning() -> None:
    (warning,) = width_warnings(make_plan(NEOX, k_dim=8 * 37))
    assert "37" in warning
    assert width_warnings(make_plan(NEOX, k_dim=320)) == []


def test_low_bits_are_counted_with_their_scales() -> None:
    layer = LAYOUTS["low_bits"]
    plan = Plan(dataclasses.replace(NEOX, layers=1), (layer,))
    packed = 8 * (40 // 2 + 2 + 1)  # codes, a scale and a zero point for each latent
    assert plan.bytes_per_token == packed + 2 * 512
    assert plan.cache_bytes(10, "float32") == 10 * (packed + 4 * 512)


def test_tokens_that_stay_exact_are_counted() -> None:
    part = Part(1, 128, bits=4, quantizer="per_channel")
    layer = neox_layer(v=part)
    shape = dataclasses.replace(NEOX, layers=1)
    plan = Plan(shape, (layer,), sinks=4, window=10)
    assert Plan.from_json(plan.to_json()) == plan
    groups, exact = 2, 4 + 10 + 5  # 83 tokens: two groups of 32 are packed, 5 do not fill one
    values = groups * (32 * 64 + 128 * 3) + exact * 128 * 2
    assert plan.cache_bytes(83) == values + 83 * 2 * 512
    assert plan.bytes_per_token == -(-plan.cache_bytes(2048) // 2048)


def test_a_plan_without_exact_tokens_is_read_as_one_that_keeps_none() -> None:
    data = make_plan(NEOX, v_dim=320).to_json()
    del data["sinks"], data["window"]
    assert Plan.from_json(data) == make_plan(NEOX, v_dim=320)


@pytest.mark.parametrize("name", ["sinks", "window"])
def test_exact_tokens_are_a_number(name: str) -> None:
    plan = dataclasses.replace(make_plan(NEOX, v_dim=320), **{name: -1})
    with pytest.raises(PlanError, match=f"{name} -1 is not a number of tokens"):
        plan.validate()
