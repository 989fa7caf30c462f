"""Counted weights and arithmetic, beside modules that were really built."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from vdcompress.cost import Cost, base_cost, layer_cost, plan_cost, with_maps
from vdcompress.load import Base
from vdcompress.modeling.layout import LayerLayout, NopePart, Part, RotaryPart
from vdcompress.pipeline.document import parameters
from vdcompress.plan import ModelShape, Plan, make_plan
from vdcompress.standard_layouts import standard_layouts

NEOX = ModelShape("gpt_neox", layers=6, hidden=512, heads=8, kv_heads=8, head_dim=64, rotary_dim=16)
LLAMA = ModelShape("llama", layers=4, hidden=512, heads=8, kv_heads=2, head_dim=64, rotary_dim=64)


def layouts(shape: ModelShape) -> list[LayerLayout]:
    """Return every kind of layout of a shape, with both kinds of maps."""
    full = shape.full_layout()
    found = [
        full,
        replace(full, v=Part(shape.kv_heads, 8)),
        LayerLayout(Part(1, 24), NopePart(1, 16), RotaryPart(1, 4, frequencies=(0, 1))),
        LayerLayout(
            Part(1, 16),
            NopePart(2, 8, maps="per_head", after_rope=True),
            RotaryPart(2, 0, maps="per_head"),
        ),
    ]
    return [with_maps(layer, maps) for layer in found for maps in ("folded", "per_head")]


def test_weights_are_those_of_the_modules(base: Base) -> None:
    for layer in layouts(base.shape):
        model = base.family.compressed_on_meta(base.config, Plan(base.shape, (layer,) * 2))
        attention = base.family.attention_modules(model)[0]
        counted = layer_cost(layer, base.shape)
        sides = {
            "q": ("q_proj", "q_expand"),
            "k": ("k_proj", "k_compress"),
            "v": ("v_compress",),
            "o": (base.family.output_name, "o_contract"),
        }
        for side, names in sides.items():
            built = sum(
                parameter.numel()
                for name, parameter in attention.named_parameters()
                if name.split(".")[0] in names and name.endswith("weight")
            )
            assert getattr(counted, side) == built, (side, layer)


def test_parameters_of_both_paths_are_all_of_attention(base: Base) -> None:
    plan = make_plan(base.shape, v_dim=8 * base.shape.kv_heads, k_dim=8 * base.shape.kv_heads)
    model = base.family.compressed_on_meta(base.config, plan)
    attentions: list[Any] = base.family.attention_modules(model)
    found = parameters(base, plan)
    total = sum(p.numel() for module in attentions for p in module.parameters())
    assert found["v_path"] + found["k_path"] == total


def test_the_base_and_a_layer_in_figures() -> None:
    base = base_cost(NEOX)
    assert base.weights == 6 * 4 * 512 * 512
    assert base.flops_per_token == 2 * base.weights
    assert base.flops_per_cached_token == 6 * 2 * 8 * (64 + 64)
    assert base.bytes_per_cached_token == 12288
    both = make_plan(NEOX, v_dim=320, k_dim=320)
    assert plan_cost(both).weights == 6 * 4 * 512 * 320
    assert plan_cost(both).bytes_per_cached_token == both.bytes_per_token


def test_one_latent_for_all_heads_reads_less_and_calculates_more() -> None:
    shared = layer_cost(LayerLayout(Part(1, 192), NopePart(1, 192), RotaryPart(1, 0)), NEOX)
    assert shared.flops_per_cached_token == 2 * 8 * (192 + 192)
    assert shared.bytes_per_cached_token == 2 * 2 * 192
    assert shared.o == 8 * 192 * 512
    per_head = layer_cost(
        with_maps(LayerLayout(Part(1, 192), NopePart(1, 192), RotaryPart(1, 0)), "per_head"), NEOX
    )
    assert per_head.o == 8 * (192 * 64 + 64 * 512)
    assert per_head.q == 8 * (512 * 64 + 64 * 192)


def test_costs_add_up() -> None:
    assert Cost(1, 2, 3, 4, 5, 6) + Cost(1, 1, 1, 1, 1, 1) == Cost(2, 3, 4, 5, 6, 7)


@pytest.mark.parametrize("shape", [NEOX, LLAMA], ids=lambda shape: shape.family)
def test_standard_layouts_have_the_widths_that_their_options_name(shape: ModelShape) -> None:
    first, *others = standard_layouts(shape)
    assert (first.options, first.layer) == ("", shape.full_layout())
    assert len({standard.options for standard in others}) == len(others)
    for standard in others:
        words = standard.options.split()
        asked = dict(zip(words[::2], map(int, words[1::2]), strict=True))
        layer = standard.layer
        assert layer.v_dim == asked["--v-dim"]
        assert layer.k_dim == asked.get("--k-dim", shape.kv_dim)
        assert layer.v_groups == asked.get("--groups", shape.kv_heads)
        assert layer.v_head_dim % 8 == layer.k_head_dim % 8 == 0
        assert layer.k_nope.after_rope == (shape is LLAMA and "--k-dim" in asked)
    assert others[-1].options == f"--groups 1 --v-dim {3 * shape.kv_dim // 8} --k-dim " + str(
        3 * shape.kv_dim // 8
    )


def test_a_single_head_has_nothing_to_share() -> None:
    one = replace(LLAMA, kv_heads=1, heads=4)
    assert [standard.options for standard in standard_layouts(one)] == [
        "",
        "--v-dim 40",
        "--v-dim 40 --k-dim 40",
    ]
