"""Calibration: moments are numpy's, gradients autograd's, the model stays as it was."""

from __future__ import annotations

import sys
from copy import deepcopy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from observed import observe
from vdcompress.calibrate import EVERYTHING, calibrate, require_enough_tokens
from vdcompress.errors import DataError, ModelError, UsageError
from vdcompress.events import Event, Progress
from vdcompress.load import Base
from vdcompress.statistics import MomentSum, Statistics

CLOSE = {"atol": 1e-6, "rtol": 1e-5}


ENDS = [RuntimeError("no"), KeyboardInterrupt()]


def standing(model: Any) -> dict[str, Any]:
    """Return everything about a model that calibration touches."""
    return {
        "attention": model.config._attn_implementation,
        "trained": [name for name, p in model.named_parameters() if p.requires_grad],
        "graded": [name for name, p in model.named_parameters() if p.grad is not None],
        "hooks": [
            name
            for name, module in model.named_modules()
            if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
        ],
        "training": model.training,
        "gradients": torch.is_grad_enabled(),
    }


def naive_moments(x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return numpy's mean and covariance of x [b, t, ...], heads side by side."""
    rows = x.flatten(0, 1).flatten(1).double().numpy()
    return rows.mean(0), np.cov(rows.T, bias=True)


def test_moments_are_numpys(base: Base, token_windows: Tensor, statistics: Statistics) -> None:
    assert statistics.tokens == token_windows.numel()
    for layer, seen in zip(statistics.layers, observe(base, token_windows), strict=True):
        joint = {"values": seen.values, "keys": seen.keys, "outputs": seen.outputs}
        for name, x in joint.items():
            found = layer.require(name)
            mean, covariance = naive_moments(x)
            assert found.count == token_windows.numel()
            np.testing.assert_allclose(found.mean, mean, **CLOSE)
            np.testing.assert_allclose(found.covariance, covariance, **CLOSE)
        queries = layer.require("queries")
        for head in range(base.shape.heads):
            mean, covariance = naive_moments(seen.queries[:, :, head])
            np.testing.assert_allclose(queries.mean[head], mean, **CLOSE)
            np.testing.assert_allclose(queries.covariance[head], covariance, **CLOSE)


def test_blocks_are_those_of_neighbouring_heads(base: Base, statistics: Statistics) -> None:
    joint = statistics.layers[0].require("keys")
    half = joint.blocks(2)
    n = base.shape.kv_dim // 2
    assert half.mean.shape == (2, n)
    torch.testing.assert_close(half.covariance[1], joint.covariance[n:, n:])
    torch.testing.assert_close(half.mean[0], joint.mean[:n])
    torch.testing.assert_close(
        half.second[0], joint.covariance[:n, :n] + torch.outer(joint.mean[:n], joint.mean[:n])
    )


# Gradients.


def drawn_labels(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor]]:
    """Return what will be drawn: probabilities [tokens, vocabulary] and labels [tokens]."""
    drawn, room = [], sys.modules["vdcompress.calibrate"]
    real = room._draw

    def spy(probabilities: Tensor, labels: torch.Generator) -> Tensor:
        drawn.append((probabilities.clone(), real(probabilities, labels)))
        return drawn[-1][1]

    monkeypatch.setattr(room, "_draw", spy)
    return drawn


def naive_gradients(base: Base, ids: Tensor, labels: Tensor) -> list[dict[str, Tensor]]:
    """Return every layer's gradients, [b, t, heads, d] each, by autograd on the whole model."""
    kept: list[dict[str, Tensor]] = []

    def attend(
        _module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        tensors = {"query_pulls": query, "key_gradients": key, "value_gradients": value}
        every = [x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value)]
        scores = query @ every[0].mT * kwargs["scaling"]
        future = torch.ones_like(scores, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(future, -torch.inf).softmax(-1)
        output = (weights @ every[1]).transpose(1, 2)
        tensors["output_gradients"] = output
        for tensor in tensors.values():
            tensor.retain_grad()
        kept.append(tensors)
        return output, None

    AttentionInterface.register("naive", attend)
    AttentionMaskInterface.register("naive", sdpa_mask)
    copy = type(base.model)(deepcopy(base.config)).eval()
    copy.load_state_dict(base.model.state_dict())
    copy.tie_weights()
    copy.config._attn_implementation = "naive"
    logits = copy(ids, use_cache=False).logits
    nn.functional.cross_entropy(logits.flatten(0, 1), labels, reduction="sum").backward()
    return [
        {
            name: tensor.grad if name == "output_gradients" else tensor.grad.transpose(1, 2)
            for name, tensor in tensors.items()
        }
        for tensors in kept
    ]


def test_gradients_are_autograds(
    base: Base, token_windows: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = token_windows[:5]
    drawn = drawn_labels(monkeypatch)
    found = calibrate(base, ids, needs=EVERYTHING, batch=5)
    labels = torch.cat([labels for _, labels in drawn])
    for layer, expected in zip(found.layers, naive_gradients(base, ids, labels), strict=True):
        for name in ("key_gradients", "value_gradients"):
            mean, covariance = naive_moments(expected[name])
            scale = np.abs(covariance).max()
            np.testing.assert_allclose(layer.require(name).mean, mean, atol=1e-5 * scale**0.5)
            np.testing.assert_allclose(
                layer.require(name).covariance, covariance, atol=1e-5 * scale, rtol=1e-3
            )
        for head in range(base.shape.heads):
            mean, covariance = naive_moments(expected["output_gradients"][:, :, head])
            own = layer.require("output_gradients")
            scale = np.abs(covariance).max()
            np.testing.assert_allclose(own.mean[head], mean, atol=1e-5 * scale**0.5)
            np.testing.assert_allclose(
                own.covariance[head], covariance, atol=1e-5 * scale, rtol=1e-3
            )
        assert layer.query_pulls is not None
        pulls = expected["query_pulls"].movedim(2, 0).flatten(1, 2)
        torch.testing.assert_close(
            layer.query_pulls.pulls.float(), pulls, rtol=2**-7, atol=1e-4 * float(pulls.abs().max())
        )


def test_pulls_belong_to_their_queries(base: Base, token_windows: Tensor) -> None:
    found = calibrate(base, token_windows[:6], needs=frozenset({"query_pulls"}), batch=2)
    for layer, seen in zip(found.layers, observe(base, token_windows[:6]), strict=True):
        assert layer.query_pulls is not None
        queries, pulls = layer.query_pulls.queries, layer.query_pulls.pulls
        assert queries.dtype == pulls.dtype == torch.bfloat16
        assert pulls.shape == queries.shape == (base.shape.heads, 6 * 64, base.shape.head_dim)
        expected = seen.queries.flatten(0, 1).transpose(0, 1)
        torch.testing.assert_close(queries.float(), expected, rtol=2**-7, atol=1e-3)


def test_a_large_sample_is_thinned(
    base: Base, token_windows: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape, ids = base.shape, token_windows[:4]
    whole = calibrate(base, ids, needs=frozenset({"query_pulls"}), batch=1)
    budget = 2 * 2 * shape.layers * shape.heads * shape.head_dim * ids.numel() // 3
    monkeypatch.setattr(sys.modules["vdcompress.calibrate"], "SAMPLE_BYTES", budget)
    thin = calibrate(base, ids, needs=frozenset({"query_pulls"}), batch=1)
    for some, every in zip(thin.layers, whole.layers, strict=True):
        assert some.query_pulls is not None
        assert every.query_pulls is not None
        for name in ("queries", "pulls"):
            kept, all_tokens = (getattr(s.query_pulls, name) for s in (some, every))
            by_window = all_tokens.unflatten(1, (4, 64))[:, :, ::4]
            assert torch.equal(kept, by_window.flatten(1, 2))


def test_labels_are_drawn_from_the_model(
    base: Base, token_windows: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their frequencies are its probabilities: this is Fisher information, not text's gradients."""
    drawn = drawn_labels(monkeypatch)
    needs = frozenset({"value_gradients"})
    found = [calibrate(base, token_windows, needs=needs, batch=8, seed=s) for s in (0, 0, 1)]
    with torch.no_grad():
        expected = base.model(token_windows).logits.softmax(-1).flatten(0, 1)
    tokens = token_windows.numel()
    probabilities = torch.cat([p for p, _ in drawn]).split(tokens)
    labels = torch.cat([x for _, x in drawn]).split(tokens)
    torch.testing.assert_close(probabilities[0], expected, atol=1e-6, rtol=1e-3)
    second = [run.layers[0].require("value_gradients").second for run in found]
    assert torch.equal(labels[0], labels[1])
    assert torch.equal(second[0], second[1])
    assert not torch.equal(labels[0], labels[2])
    # as many labels fall into each half of the vocabulary, and into what the model thinks likely,
    # as it says, within five standard deviations; the text's own tokens are not drawn from it
    half = torch.arange(expected.shape[1]) < expected.shape[1] // 2
    likely = expected >= expected.median(-1, keepdim=True).values
    for chosen in (half.expand_as(expected), likely):
        share = (expected.double() * chosen).sum(-1)
        spread = float((share * (1 - share)).sum()) ** 0.5
        for drawn_ones in labels:
            found = chosen.gather(1, drawn_ones[:, None]).sum()
            assert abs(float(found - share.sum())) < 5 * spread
    in_text = likely.gather(1, token_windows.flatten()[:, None]).sum()
    assert abs(float(in_text - share.sum())) > 5 * spread


# Sums.


def test_moments_are_float64_and_symmetric(statistics: Statistics) -> None:
    for layer in statistics.layers:
        for name in sorted(EVERYTHING - {"query_pulls"}):
            moments = layer.require(name)
            assert moments.mean.dtype == moments.covariance.dtype == torch.float64
            assert torch.equal(moments.covariance, moments.covariance.mT)


@pytest.mark.parametrize("batch", [1, 3, 16])
def test_batches_do_not_matter(
    base: Base, token_windows: Tensor, statistics: Statistics, batch: int
) -> None:
    again = calibrate(base, token_windows, batch=batch)
    assert again.tokens == statistics.tokens
    for layer, other in zip(again.layers, statistics.layers, strict=True):
        for name in ("values", "outputs", "keys", "queries"):
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


@pytest.mark.parametrize(
    "needs",
    [set(), *({name} for name in sorted(EVERYTHING)), {"values", "key_gradients"}, EVERYTHING],
    ids=lambda names: "-".join(sorted(names)),
)
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


NEEDS = pytest.mark.parametrize(
    "needs", [frozenset({"values"}), EVERYTHING], ids=["forward", "backward"]
)


@NEEDS
def test_the_model_is_as_before(base: Base, token_windows: Tensor, needs: frozenset[str]) -> None:
    before = standing(base.model)
    calibrate(base, token_windows[:4], needs=needs)
    assert standing(base.model) == before


@NEEDS
@pytest.mark.parametrize("error", ENDS, ids=repr)
def test_the_model_is_as_before_after_an_exception(
    base: Base, token_windows: Tensor, needs: frozenset[str], error: BaseException
) -> None:
    before, during = standing(base.model), {}

    def stop(_event: Event) -> None:
        during.update(standing(base.model))
        raise error

    with pytest.raises(type(error)):
        calibrate(base, token_windows[:4], needs=needs, on_event=stop)
    assert during["attention"] != before["attention"]
    assert (during["trained"] == []) == (needs == EVERYTHING)
    assert standing(base.model) == before


@pytest.mark.parametrize("needs", [frozenset({"values"}), EVERYTHING], ids=["forward", "backward"])
def test_the_model_is_as_before_after_a_broken_forward(
    base: Base, token_windows: Tensor, monkeypatch: pytest.MonkeyPatch, needs: frozenset[str]
) -> None:
    before = standing(base.model)
    last = base.family.attention_modules(base.model)[-1]

    def broken(*args: Any, **kwargs: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(last, "forward", broken)
    with pytest.raises(ZeroDivisionError):
        calibrate(base, token_windows[:4], needs=needs)
    assert standing(base.model) == before


def test_what_was_frozen_stays_frozen(base: Base, token_windows: Tensor) -> None:
    embeddings = base.model.get_input_embeddings()
    embeddings.weight.requires_grad_(False)
    try:
        before = standing(base.model)
        calibrate(base, token_windows[:4], needs=EVERYTHING)
        assert standing(base.model) == before
    finally:
        embeddings.weight.requires_grad_(True)


def test_an_unknown_statistic_is_refused(base: Base, token_windows: Tensor) -> None:
    with pytest.raises(UsageError, match="no statistic is called 'value'") as caught:
        calibrate(base, token_windows[:4], needs=frozenset({"value"}))
    assert "value_gradients" in caught.value.hint


def test_too_few_tokens_are_refused_with_the_number_wanted(base: Base) -> None:
    before, shape = standing(base.model), base.shape
    few = torch.ones(3, 85, dtype=torch.long)
    with pytest.raises(DataError, match="255 calibration tokens") as caught:
        calibrate(base, few)
    assert "256" in caught.value.hint  # 4 heads of 16, 4 tokens for each dimension
    assert standing(base.model) == before
    joint = 4 * shape.kv_dim  # over all key/value heads
    for needs, wanted in (
        ({"outputs"}, 256),
        ({"values"}, joint),
        ({"key_gradients"}, joint),
        ({"queries"}, 64),
        (set(), 0),
    ):
        require_enough_tokens(shape, wanted, frozenset(needs))
        if wanted:
            with pytest.raises(DataError) as caught:
                require_enough_tokens(shape, wanted - 1, frozenset(needs))
            assert str(wanted) in caught.value.hint


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
    with torch.no_grad():  # the last row of V's projection
        names = ("query_key_value.weight", "v_proj.weight")
        [weight] = [p for name, p in attention.named_parameters() if name in names]
        weight[-1, 0] = bad
    before = standing(copy)
    with pytest.raises(ModelError, match=r"NaN or infinity") as caught:
        calibrate(damaged, token_windows[:4])
    assert base.family.parameter_prefix(layer).rstrip(".") in caught.value.message
    assert standing(copy) == before
