"""Repair: the output projection becomes scikit-learn's regression on what attention returns."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LinearRegression
from torch import Tensor

from observed import observe
from vdcompress.events import Event, Progress
from vdcompress.load import Base
from vdcompress.pipeline.rewriting import compressed_model
from vdcompress.plan import Plan, Start, make_plan
from vdcompress.repair import needs_repair, repair
from vdcompress.rewrite import rewrite
from vdcompress.statistics import Statistics

START = Start("pca", "local", 0)
CHANGES = {
    "keys": {"k_dim": 32, "k_groups": 2},
    "values": {"v_dim": 16, "v_groups": 1},
    "both": {"v_dim": 16, "k_dim": 16, "groups": 1},
}


def planned(base: Base, change: str, start: Start = START) -> Plan:
    """Return a plan of a base with two key/value heads or four."""
    wanted = dict(CHANGES[change])
    if "k_dim" in wanted:
        wanted["k_dim"] = wanted["k_dim"] * base.shape.kv_dim // 64
        if base.shape.rotary_dim < base.shape.head_dim:
            groups = wanted.get("k_groups", wanted.get("groups"))
            wanted["k_rotary_dim"] = 4 * groups
    return make_plan(base.shape, **wanted, start=start)


def attended(base: Base, model: Any, ids: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Run each layer of a compressed model on the base's inputs.

    Returns:
        For each layer what its output projection is given, what it returns, and what the base's
        attention returned, [tokens, ...].
    """
    found = []
    positions = torch.arange(ids.shape[1])[None]
    for layer, attention in zip(
        observe(base, ids), base.family.attention_modules(model), strict=True
    ):
        seen: list[Tensor] = []
        projection = base.family.output_projection(attention)
        handle = projection.register_forward_pre_hook(lambda _m, a, seen=seen: seen.append(a[0]))
        angles = model.base_model.rotary_emb(layer.x, positions)
        with torch.no_grad():
            y = attention(layer.x, attention_mask=None, position_embeddings=angles)[0]
        handle.remove()
        found.append(tuple(x.flatten(0, 1).double() for x in (seen[0], y, layer.given)))
    return found


@pytest.mark.parametrize("change", CHANGES)
def test_the_refit_is_a_linear_regression(
    base: Base, statistics: Statistics, token_windows: Tensor, change: str
) -> None:
    plan = planned(base, change)
    rewritten = rewrite(base, plan, statistics)
    before = deepcopy(rewritten.state_dict())
    samples = attended(base, rewritten, token_windows)
    model = repair(base, rewritten, plan, token_windows, batch=3)
    assert model is rewritten
    for (z, unrepaired, y), attention in zip(
        samples, base.family.attention_modules(model), strict=True
    ):
        oracle = LinearRegression().fit(z.numpy(), y.numpy())
        found = base.family.output_projection(attention)
        weight, bias = found.weight.detach().double(), found.bias.detach().double()
        predicted = z @ weight.T + bias
        np.testing.assert_allclose(predicted, oracle.predict(z.numpy()), atol=2e-3)
        least = float((y - torch.from_numpy(oracle.predict(z.numpy()))).square().mean())
        assert least <= float((y - predicted).square().mean()) <= least * (1 + 1e-4)
        assert float((y - predicted).square().mean()) < float((y - unrepaired).square().mean())
    named = {f"{base.family.output_name}.weight", f"{base.family.output_name}.bias"}
    for name, tensor in model.state_dict().items():
        if "attention" in name or "self_attn" in name:
            replaced = any(name.endswith(ending) for ending in named)
            assert torch.equal(tensor, before[name]) != replaced, name
        else:
            assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("initializer", ["random", "fisher"])
@pytest.mark.parametrize("change", CHANGES)
def test_calibration_windows_are_never_worse(
    base: Base, statistics: Statistics, token_windows: Tensor, change: str, initializer: str
) -> None:
    plan = planned(base, change, Start(initializer, "local", 0))
    errors = []
    for model in (
        rewrite(base, plan, statistics),
        compressed_model(base, plan, statistics, token_windows, lambda _event: None),
    ):
        runs = attended(base, model, token_windows)
        errors.append([float((y - expected).square().mean()) for _, y, expected in runs])
    for rewritten, repaired in zip(*errors, strict=True):
        assert repaired <= rewritten * (1 + 1e-6)
    assert sum(errors[1]) < 0.999 * sum(errors[0])


@pytest.mark.parametrize("change", CHANGES)
def test_layers_that_did_not_change_are_untouched(
    base: Base, statistics: Statistics, token_windows: Tensor, change: str
) -> None:
    narrow = planned(base, change)
    plan = replace(narrow, layers=(base.shape.full_layout(), narrow.layers[1]))
    plan.validate()
    model = rewrite(base, plan, statistics)
    before = {n: (t.data_ptr(), t.clone()) for n, t in model.state_dict().items()}
    repair(base, model, plan, token_windows)
    first = base.family.parameter_prefix(0)
    for name, tensor in model.state_dict().items():
        if name.startswith(first):
            assert tensor.data_ptr() == before[name][0]
            assert torch.equal(tensor, before[name][1])
    second = base.family.parameter_prefix(1) + f"{base.family.output_name}.weight"
    assert not torch.equal(model.state_dict()[second], before[second][1])


def test_what_needs_repair(base: Base) -> None:
    shape, refits = base.shape, ("local", "none")
    for change in CHANGES:
        asked = [needs_repair(planned(base, change, Start("pca", refit, 0))) for refit in refits]
        assert asked == [True, False]
    own = make_plan(shape, v_dim=8 * shape.kv_heads, start=START)
    assert not needs_repair(own)
    assert not needs_repair(make_plan(shape, v_dim=shape.kv_dim, start=START))
    assert not needs_repair(make_plan(shape, v_dim=shape.kv_dim, v_groups=1, start=START))


def hooks(*models: Any) -> int:
    modules = (module for model in models for module in model.modules())
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules)


@pytest.mark.parametrize("error", [None, RuntimeError("no"), KeyboardInterrupt()], ids=repr)
def test_hooks_are_removed(
    base: Base, statistics: Statistics, token_windows: Tensor, error: BaseException | None
) -> None:
    plan = planned(base, "both")
    model = rewrite(base, plan, statistics)
    before, during = hooks(base.model, model), []
    kept = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    heard: list[int] = []

    def listen(event: Event) -> None:
        assert isinstance(event, Progress)
        heard.append(event.done)
        during.append(hooks(base.model, model))
        if error is not None:
            raise error

    if error is None:
        repair(base, model, plan, token_windows[:5], batch=2, on_event=listen)
        assert heard == [2, 4, 5]
    else:
        with pytest.raises(type(error)):
            repair(base, model, plan, token_windows[:5], batch=2, on_event=listen)
    assert during[0] == before + base.shape.layers
    assert hooks(base.model, model) == before
    for name, tensor in base.model.state_dict().items():
        assert torch.equal(tensor, kept[name])


def test_weights_are_rounded_to_what_will_be_stored(
    base: Base, statistics: Statistics, token_windows: Tensor
) -> None:
    coarse = replace(base, dtype="bfloat16")
    plan = planned(base, "both")
    model = rewrite(coarse, plan, statistics)
    repair(coarse, model, plan, token_windows)
    exact = repair(base, rewrite(base, plan, statistics), plan, token_windows)
    for found, fine in zip(
        base.family.attention_modules(model), base.family.attention_modules(exact), strict=True
    ):
        for name, parameter in base.family.output_projection(found).named_parameters():
            assert parameter.dtype == torch.float32
            assert torch.equal(parameter, parameter.to(torch.bfloat16).float())
            assert parameter.requires_grad
            precise = base.family.output_projection(fine).get_parameter(name)
            assert not torch.equal(precise, precise.to(torch.bfloat16).float())
