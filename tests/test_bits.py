"""Bits that are asked for become layouts, bytes and names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from conftest import Vdcompress
from vdcompress.bits import SINKS, WINDOW
from vdcompress.errors import PlanError
from vdcompress.modeling.layout import NopePart, Part, RotaryPart
from vdcompress.plan import ModelShape, Plan, make_plan
from vdcompress.request import Request

NEOX = ModelShape("gpt_neox", 6, 512, 8, 8, 64, 16)
LLAMA = ModelShape("llama", 4, 256, 4, 2, 64, 64)


def test_quantisation_alone_keeps_every_width() -> None:
    layer = make_plan(NEOX, v_bits=4, k_bits=4).layers[0]
    full = NEOX.full_layout()
    assert layer.v == Part(8, 64, 4, "per_token")
    assert layer.k_nope == NopePart(8, 48, 4, "per_token")
    assert layer.k_rotary == RotaryPart(
        8, 16, 8, "per_token", frequencies=full.k_rotary.frequencies
    )


def test_bytes_count_scales_and_zero_points() -> None:
    plan = make_plan(NEOX, v_bits=8, k_bits=8)
    assert (plan.sinks, plan.window) == (0, 0)
    head = (64 + 3) + (48 + 3) + (16 + 3)  # fp16 scale and a byte of zero point for each part
    assert plan.bytes_per_token == 6 * 8 * head == 6576
    shared = make_plan(
        NEOX,
        v_dim=256,
        k_dim=320,
        groups=1,
        k_rotary_dim=128,
        v_bits=3,
        k_bits=3,
        window=0,
        sinks=0,
    )
    v, nope, rotary = 256 * 3 // 8 + 4 * 2, 192 * 3 // 8 + 3 * 2, 128 + 2 * 3
    assert shared.bytes_per_token == 6 * (v + nope + rotary)


def test_few_bits_keep_sinks_and_a_window_unless_told() -> None:
    plan = make_plan(NEOX, v_bits=4)
    assert (plan.sinks, plan.window) == (SINKS, WINDOW)
    assert plan.layers[0].k_nope.bits == 16
    told = make_plan(NEOX, v_bits=4, sinks=0, window=7)
    assert (told.sinks, told.window) == (0, 7)
    assert Plan.from_json(told.to_json()) == told


def test_whole_rotary_keys_are_packed_behind_rope() -> None:
    layer = make_plan(LLAMA, k_bits=4).layers[0]
    assert layer.k_nope == NopePart(2, 64, 4, "per_token", maps="per_head", after_rope=True)
    assert layer.k_rotary.width == 0
    assert make_plan(LLAMA, v_bits=4).layers[0].k_rotary == LLAMA.full_layout().k_rotary


def test_rotary_keys_have_their_own_bits() -> None:
    for asked, bits, name in ((None, 8, "per_token"), (4, 4, "per_channel"), (16, 16, None)):
        part = make_plan(NEOX, k_bits=3, k_rotary_bits=asked).layers[0].k_rotary
        assert (part.bits, part.quantizer) == (bits, name)
    assert make_plan(NEOX, k_bits=16, v_bits=8).layers[0].k_rotary.bits == 16


def test_names_of_runs() -> None:
    assert Request.of(v_bits=4, k_bits=8).label() == "vb4-kb8"
    narrow = Request.of(v_dim=320, groups=1, v_bits=3, k_rotary_bits=4, sinks=4, window=64)
    assert narrow.label() == "g1-v320-vb3-rb4-s4-w64"


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"v_bits": 5}, "v_bits 5 is none of 16, 8, 4, 3, 2"),
        ({"v_dim": 320, "window": 64}, "window without bits"),
        ({"v_bits": 4, "sinks": -1}, "sinks -1 is below zero"),
        ({"v_bits": 16}, "no width and no bits"),
    ],
)
def test_what_cannot_be_is_said(asked: dict[str, Any], reason: str) -> None:
    with pytest.raises(PlanError, match=reason):
        make_plan(NEOX, **asked)


def test_vllm_takes_no_bits() -> None:
    for asked in ({"v_dim": 256}, {"kv_budget": 0.5}):
        found = Request(v_bits=4, target="vllm", **asked).problems(NEOX)  # type: ignore[arg-type]
        assert any("packed" in reason for reason in found)


def test_whole_rotary_heads_have_no_bits_of_their_own() -> None:
    with pytest.raises(PlanError, match="k_rotary_bits: RoPE rotates whole heads"):
        make_plan(LLAMA, k_bits=4, k_rotary_bits=8)


SMALL = ("--samples", "8", "--seq-len", "64", "--windows", "2")


def test_apply_and_finetune_with_bits(
    vdcompress: Vdcompress, tiny_neox: Path, text_file: Path
) -> None:
    made = vdcompress(
        *("apply", tiny_neox, "--k-bits", "8", "--v-bits", "4", "--sinks", "2", "--window", "8"),
        *(*SMALL, "--data", text_file, "-o", "here", "--json"),
    )
    assert made.code == 0, made.err
    found = made.json
    plan = Plan.from_json(found["plan"])
    assert (found["plan"]["v_bits"], found["plan"]["k_bits"]) == (4, 8)
    assert (plan.sinks, plan.window) == (2, 8)
    measured = found["kv_cache"]["measured"]
    assert measured["bytes"] == plan.cache_bytes(measured["tokens"], "float32")
    assert measured["bytes_per_token"] == plan.cache_bytes(measured["tokens"]) / measured["tokens"]
    assert found["perplexity"]["ratio"] == pytest.approx(1, abs=0.05)
    healed = vdcompress(
        *("finetune", "here", "--samples", "16", "--epochs", "1", "--seq-len", "32"),
        *("-o", "healed", "--json"),
    )
    assert healed.code == 0, healed.err
    assert healed.json["plan"] == found["plan"]
    assert vdcompress("inspect", "healed").code == 0


def test_streamed_models_are_packed_alike(
    vdcompress: Vdcompress, tiny_llama: Path, text_file: Path
) -> None:
    asked = ("--v-bits", "4", "--k-bits", "4", *SMALL, "--data", text_file, "--json")
    whole = vdcompress("apply", tiny_llama, *asked, "-o", "whole")
    streamed = vdcompress("apply", tiny_llama, *asked, "-o", "streamed", "--max-memory", "100KB")
    assert (whole.code, streamed.code) == (0, 0), whole.err + streamed.err
    assert streamed.json["plan"] == whole.json["plan"]
    assert streamed.json["kv_cache"]["measured"] is None
    ratios = [ended.json["perplexity"]["ratio"] for ended in (whole, streamed)]
    assert ratios[0] == pytest.approx(ratios[1], rel=1e-4)
