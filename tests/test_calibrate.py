"""Calibration: the moments are numpy's, the hooks are gone, bad data and weights are named."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from vdcompress.calibrate import calibrate, require_enough_tokens
from vdcompress.errors import DataError, ModelError
from vdcompress.events import Event, Progress
from vdcompress.load import Base
from vdcompress.statistics import MomentSum, Statistics

CLOSE = {"atol": 1e-6, "rtol": 1e-5}


def hooks(model: nn.Module) -> int:
    """Count hooks of every kind that calibration could attach."""
    return sum(
        len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()
    )


def naive_activations(base: Base, windows: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Collect V and attention outputs [tokens, n] of every layer, the simple way."""
    values: list[Tensor] = []
    outputs: list[Tensor] = []
    handles = []
    for attention in base.family.attention_modules(base.model):
        tap = base.family.value_tap(attention)
        projection = base.family.output_projection(attention)
        handles += [
            tap.module.register_forward_hook(
                lambda _m, _a, out, tap=tap: values.append(tap.read(out).flatten(0, 1))
            ),
            projection.register_forward_pre_hook(lambda _m, a: outputs.append(a[0].flatten(0, 1))),
        ]
    with torch.no_grad():
        base.model.base_model(windows, use_cache=False)
    for handle in handles:
        handle.remove()
    return values, outputs


def test_moments_are_numpys(base: Base, token_windows: Tensor, statistics: Statistics) -> None:
    values, outputs = naive_activations(base, token_windows)
    assert statistics.tokens == token_windows.numel()
    for layer, v, o in zip(statistics.layers, values, outputs, strict=True):
        joint = o.double().numpy()
        assert layer.outputs.count == len(joint) == token_windows.numel()
        np.testing.assert_allclose(layer.outputs.mean, joint.mean(0), **CLOSE)
        np.testing.assert_allclose(layer.outputs.covariance, np.cov(joint.T, bias=True), **CLOSE)
        for head in range(base.shape.kv_heads):
            own = v[:, head].double().numpy()
            np.testing.assert_allclose(layer.values.mean[head], own.mean(0), **CLOSE)
            np.testing.assert_allclose(
                layer.values.covariance[head], np.cov(own.T, bias=True), **CLOSE
            )


def test_moments_are_float64_and_symmetric(statistics: Statistics) -> None:
    for layer in statistics.layers:
        for moments in (layer.values, layer.outputs):
            assert moments.mean.dtype == moments.covariance.dtype == torch.float64
            assert torch.equal(moments.covariance, moments.covariance.mT)


@pytest.mark.parametrize("batch", [1, 3, 16])
def test_batches_do_not_matter(
    base: Base, token_windows: Tensor, statistics: Statistics, batch: int
) -> None:
    again = calibrate(base, token_windows, batch=batch)
    assert again.tokens == statistics.tokens
    for layer, other in zip(again.layers, statistics.layers, strict=True):
        for name in ("values", "outputs"):
            found, expected = getattr(layer, name), getattr(other, name)
            assert found.count == expected.count
            torch.testing.assert_close(found.mean, expected.mean, **CLOSE)
            torch.testing.assert_close(found.covariance, expected.covariance, **CLOSE)


def test_sums_keep_the_digits_of_small_variances() -> None:
    draw = np.random.default_rng(0)
    x = draw.normal(size=(5000, 6)).astype(np.float32) * 1e-2 + 30
    total = MomentSum()
    for part in np.array_split(x, 7):
        total.add(torch.from_numpy(part))
    moments = total.moments()
    assert moments is not None
    np.testing.assert_allclose(
        moments.covariance, np.cov(x.astype(np.float64).T, bias=True), rtol=1e-6, atol=1e-11
    )


def test_nothing_added_is_no_moment() -> None:
    assert MomentSum().moments() is None
    assert MomentSum().finite()


@pytest.mark.parametrize("needs", [set(), {"values"}, {"outputs"}, {"values", "outputs"}], ids=str)
def test_only_what_is_needed_is_measured(
    base: Base, token_windows: Tensor, needs: set[str]
) -> None:
    found = calibrate(base, token_windows[:4], needs=frozenset(needs))
    for layer in found.layers:
        assert {name for name, moments in vars(layer).items() if moments} == needs


def test_progress_is_told(base: Base, token_windows: Tensor) -> None:
    events: list[Event] = []
    calibrate(base, token_windows, batch=5, on_event=events.append)
    assert [e.done for e in events if isinstance(e, Progress)] == [5, 10, 15, 16]


def test_hooks_are_removed(base: Base, token_windows: Tensor) -> None:
    before = hooks(base.model)
    calibrate(base, token_windows[:4])
    assert hooks(base.model) == before


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt()], ids=repr)
def test_hooks_are_removed_after_an_exception(
    base: Base, token_windows: Tensor, error: BaseException
) -> None:
    before, during = hooks(base.model), 0

    def stop(event: Event) -> None:
        nonlocal during
        during = hooks(base.model)
        raise error

    with pytest.raises(type(error)):
        calibrate(base, token_windows[:4], on_event=stop)
    assert during == before + 2 * base.shape.layers
    assert hooks(base.model) == before


def test_hooks_are_removed_after_a_broken_forward(
    base: Base, token_windows: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = hooks(base.model)
    last = base.family.attention_modules(base.model)[-1]

    def broken(*args: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(last, "forward", broken)
    with pytest.raises(ZeroDivisionError):
        calibrate(base, token_windows[:4])
    assert hooks(base.model) == before


def test_too_few_tokens_are_refused_with_the_number_wanted(base: Base) -> None:
    before = hooks(base.model)
    few = torch.ones(3, 85, dtype=torch.long)
    with pytest.raises(DataError, match="255 calibration tokens") as caught:
        calibrate(base, few)
    assert "256" in caught.value.hint  # 4 heads of 16, 4 tokens for each dimension
    assert hooks(base.model) == before
    require_enough_tokens(base.shape, 256, frozenset({"outputs"}))
    require_enough_tokens(base.shape, 64, frozenset({"values"}))
    require_enough_tokens(base.shape, 0, frozenset())
    with pytest.raises(DataError) as caught:
        require_enough_tokens(base.shape, 63, frozenset({"values"}))
    assert "64" in caught.value.hint


@pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("layer", [0, 1])
def test_what_is_not_finite_is_named(
    base: Base, token_windows: Tensor, layer: int, bad: float
) -> None:
    copy = type(base.model)(base.config).eval()
    copy.load_state_dict(base.model.state_dict())
    copy.tie_weights()
    damaged = replace(base, model=copy)
    attention = base.family.attention_modules(copy)[layer]
    with torch.no_grad():
        dict(base.family.value_tap(attention).module.named_parameters())["weight"][-1, 0] = bad
    before = hooks(copy)
    with pytest.raises(ModelError, match=r"NaN or infinity") as caught:
        calibrate(damaged, token_windows[:4])
    assert base.family.parameter_prefix(layer).rstrip(".") in caught.value.message
    assert hooks(copy) == before
