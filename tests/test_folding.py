"""Folding changes the layout of weights and not what the model says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

import vdcompress as vd
from vdcompress.cost import with_maps
from vdcompress.folding import folded, folded_plan
from vdcompress.gains import gains
from vdcompress.load import Base
from vdcompress.statistics import Statistics


def shared(base: Base, statistics: Statistics, maps: str) -> vd.Compressed:
    """Return a model with one latent for all heads; maps of this kind where there is a choice."""
    request = vd.Request(v_dim=16, k_dim=24, v_groups=1, k_groups=1)
    plan = vd.plan_for(base.shape, request, gains=gains(base.shape, statistics))
    plan = replace(plan, layers=tuple(with_maps(layer, maps) for layer in plan.layers))
    return vd.Compressed.of(base, plan, vd.rewrite(base, plan, statistics))


def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(tokens).logits


def test_a_folded_model_says_the_same(
    base: Base, statistics: Statistics, token_windows: torch.Tensor
) -> None:
    mapped = shared(base, statistics, "per_head")
    assert any("o_contract" in name for name, _ in mapped.model.named_parameters())
    found = folded(mapped)
    assert found.plan == folded_plan(mapped.plan) != mapped.plan
    assert not any("o_contract" in name for name, _ in found.model.named_parameters())
    behind = found.plan.layers[0].k_nope.after_rope
    assert any("q_expand" in name for name, _ in found.model.named_parameters()) == behind
    assert found.model.config.layer_layout(0) == found.plan.layers[0]
    before, after = (logits(which.model, token_windows[:4]) for which in (mapped, found))
    torch.testing.assert_close(after, before, atol=2e-5, rtol=1e-4)
    assert not torch.equal(before, logits(base.model, token_windows[:4]))


def test_what_is_folded_already_stays_itself(base: Base, statistics: Statistics) -> None:
    compressed = shared(base, statistics, "folded")
    assert folded(compressed) is compressed


def test_folded_weights_are_those_that_will_be_stored(base: Base, statistics: Statistics) -> None:
    mapped = replace(shared(base, statistics, "per_head"), dtype="bfloat16")
    for name, parameter in folded(mapped).model.named_parameters():
        if name.endswith(("dense.weight", "o_proj.weight", "q_proj.weight")):
            folded_here = "q_proj" not in name or not mapped.plan.layers[0].k_nope.after_rope
            assert not folded_here or torch.equal(parameter, parameter.bfloat16().float())
