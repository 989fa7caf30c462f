"""Gains: what they add up to, that latents keep their word, and that nats are nats."""

from __future__ import annotations

from importlib.resources import files
from itertools import islice, pairwise
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from observed import observe
from vdcompress.allocate import predicted_loss
from vdcompress.attention_tap import attending_by
from vdcompress.calibrate import calibrate
from vdcompress.data.stdlib import documents
from vdcompress.errors import UsageError
from vdcompress.evaluate import evaluate
from vdcompress.gains import NEEDS, gains, output_shares
from vdcompress.latents import rotary
from vdcompress.latents.balance import balance
from vdcompress.latents.keys import KeyMetric
from vdcompress.latents.lowrank import best_encoder, block_diagonal, regression_decoder
from vdcompress.load import Base, load
from vdcompress.plan import ModelShape, Start, plan_for
from vdcompress.request import Request
from vdcompress.rewrite import rewrite
from vdcompress.statistics import LayerStatistics, Statistics


def counts(shape: ModelShape) -> list[int]:
    return [n for n in range(1, shape.kv_heads + 1) if shape.kv_heads % n == 0]


def test_gains_fall_to_zero(base: Base, statistics: Statistics) -> None:
    shape = base.shape
    for layer in gains(shape, statistics):
        assert list(layer.v) == list(layer.k_nope) == counts(shape)
        whole = shape.rotary_dim == shape.head_dim
        assert list(layer.k_rotary) == ([] if whole else counts(shape))
        for groups in counts(shape):
            joined = shape.kv_heads // groups
            rest = shape.head_dim if whole else shape.head_dim - shape.rotary_dim
            curves = [layer.v[groups], layer.k_nope[groups], *layer.k_rotary.get(groups, ())]
            pairs = 0 if whole else shape.rotary_dim // 2
            assert [len(c) - 1 for c in curves] == [
                joined * shape.head_dim,
                joined * rest,
                *[joined] * pairs,
            ]
            for curve in curves:
                assert curve[0] > 0
                assert curve[-1] == 0.0
                steps = [before - after for before, after in pairwise(curve)]
                assert all(step >= 0 for step in steps)
                for step, following in pairwise(steps):
                    assert following <= step * (1 + 1e-9) + 1e-18


@pytest.mark.parametrize("groups", [1, 2])
def test_gains_are_the_damage_of_the_solved_latents(
    base: Base, statistics: Statistics, groups: int
) -> None:
    """tr(M P C P^T) / 2 with P = I - D E of the latents that the widths ask for."""
    shape, width = base.shape, 11
    for layer, found in zip(statistics.layers, gains(shape, statistics, [groups]), strict=True):
        for value, gradient, curve in (
            ("values", "value_gradients", found.v[groups]),
            ("keys", "key_gradients", found.k_nope[groups]),
        ):
            x, g = (layer.require(name).blocks(groups) for name in (value, gradient))
            spread, reading = x.covariance, g.second
            if value == "keys" and shape.rotary_dim < shape.head_dim:
                still = [
                    head * shape.head_dim + place
                    for head in range(shape.kv_heads // groups)
                    for place in range(shape.rotary_dim, shape.head_dim)
                ]
                spread, reading = (m[:, still][..., still] for m in (spread, reading))
            encoder = best_encoder(reading, spread, width)
            identity = torch.eye(spread.shape[-1], dtype=torch.float64)
            left = identity - regression_decoder(encoder, spread) @ encoder
            damage = (reading @ left @ spread @ left.mT).diagonal(dim1=-2, dim2=-1).sum()
            assert curve[width] == pytest.approx(float(damage) / 2)


@pytest.mark.parametrize("groups", [1, 2])
def test_rounding_is_the_damage_of_balanced_latents(
    base: Base, statistics: Statistics, groups: int
) -> None:
    """tr(C) tr(W) / 2 r of T z, z = E x read by D: noise of the mean variance on every number."""
    width = 11
    for layer, found in zip(
        statistics.layers, gains(base.shape, statistics, [groups]), strict=True
    ):
        x, g = layer.require("values").blocks(groups), layer.require("value_gradients")
        reading = g.blocks(groups).second
        encoder = best_encoder(reading, x.covariance, width)
        decoder = regression_decoder(encoder, x.covariance)
        spread, read = encoder @ x.covariance @ encoder.mT, decoder.mT @ reading @ decoder
        basis, back = balance(spread, read)
        total = 0.0
        for kept, seen in zip(basis @ spread @ basis.mT, back.mT @ read @ back, strict=True):
            total += float(kept.trace() * seen.trace()) / width / 2
        assert found.rounding.v[groups][width] == pytest.approx(total, rel=1e-6)
        assert found.rounding.v[groups][0] == 0.0


def test_rounding_rotary_keys_is_the_damage_of_balanced_pairs(
    base: Base, statistics: Statistics
) -> None:
    """Written out in real numbers: every pair's two numbers get noise of the mean variance."""
    shape = base.shape
    if shape.rotary_dim == shape.head_dim:
        pytest.skip("whole heads are rotated")
    groups, pairs = 1, shape.rotary_dim // 2
    counts = [2, 1] + [0] * (pairs - 2)
    for layer, found in zip(statistics.layers, gains(shape, statistics, [groups]), strict=True):
        keys, by_key = layer.require("keys"), layer.require("key_gradients")
        metric = KeyMetric(by_key.blocks(groups).second, keys.blocks(groups))
        reading, spread = rotary.complex_moments(metric, shape.rotary_dim, shape.kv_heads)
        variance = weight = 0.0
        for frequency, count in enumerate(counts):
            if count:
                encoder = best_encoder(reading[0, frequency], spread[0, frequency], count)
                decoder = regression_decoder(encoder, spread[0, frequency])
                inner = encoder @ spread[0, frequency] @ encoder.mH
                read = decoder.mH @ reading[0, frequency] @ decoder
                basis, back = balance(inner, read)
                variance += float((basis @ inner @ basis.mH).trace().real)
                weight += float((back.mH @ read @ back).trace().real)
        # E (Re conj(g) e)^2 = |g|^2 |e|^2 / 2; half of it is the loss; |e|^2 = 2 (variance / 2 P)
        total = weight / 2 / 2 * 2 * variance / (2 * sum(counts))
        assert found.rounding.rotary(groups, counts) == pytest.approx(total, rel=1e-6)


def test_only_asked_for_groups_are_measured(base: Base, statistics: Statistics) -> None:
    [layer, _] = gains(base.shape, statistics, [2])
    assert list(layer.v) == list(layer.k_nope) == [2]
    assert layer.v[2] == gains(base.shape, statistics)[0].v[2]


def test_what_gains_read_is_named(base: Base, token_windows: Tensor) -> None:
    enough = calibrate(base, token_windows, needs=NEEDS, batch=8)
    assert gains(base.shape, enough, [1])
    for missing in sorted(NEEDS):
        kept = [LayerStatistics(**vars(layer) | {missing: None}) for layer in enough.layers]
        with pytest.raises(UsageError, match=f"hold no {missing}"):
            gains(base.shape, Statistics(tuple(kept), enough.tokens), [1])


def test_shares_are_those_of_the_output_without_gradients(
    base: Base, statistics: Statistics, token_windows: Tensor
) -> None:
    """Which part of E|W_o (v - mean)|^2 over tokens a projection of V leaves out."""
    shape = base.shape
    attention = base.family.attention_modules(base.model)[0]
    weight = base.family.weights(attention).o.weight.double().unflatten(1, (shape.heads, -1))
    found = output_shares(base, statistics, [1, 2])[0]
    sharing = shape.heads // shape.kv_heads
    gram = torch.stack([weight[:, h].T @ weight[:, h] for h in range(shape.heads)])
    seen = observe(base, token_windows)[0].values.flatten(0, 1).double()
    values = (seen - seen.mean(0)).flatten(1)
    for groups in (1, 2):
        assert found[groups][0] == 1.0
        assert found[groups][-1] == 0.0
        reading = block_diagonal(gram.unflatten(0, (-1, sharing)).sum(1), groups)
        x = values.unflatten(1, (groups, -1))
        spread = torch.einsum("ngx,ngy->gxy", x, x) / len(x)
        encoder = best_encoder(reading, spread, 9)
        left = x - torch.einsum("gxr,gry,ngy->ngx", regression_decoder(encoder, spread), encoder, x)
        lost, all_of_it = (float(torch.einsum("ngx,gxy,ngy->", t, reading, t)) for t in (left, x))
        assert found[groups][9] == pytest.approx(lost / all_of_it, rel=1e-4)


# Nats. An error that no gradient knows of must cost what the unit says, closely.


def divergence(expected: Tensor, logits: Tensor) -> float:
    """Mean over tokens of KL(expected || logits), in float64."""
    p, q = expected.double().log_softmax(-1), logits.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("side", ["keys", "values"])
@pytest.mark.parametrize("layer", [0, 1])
def test_random_errors_cost_what_gradients_say(
    base: Base, statistics: Statistics, token_windows: Tensor, side: str, layer: int
) -> None:
    """Noise of covariance s^2 I on all heads of one layer costs s^2 tr(E[g g^T]) / 2 per token."""
    moments = statistics.layers[layer].require(f"{side.removesuffix('s')}_gradients")
    size = (2 * 1e-3 / float(moments.second.trace())) ** 0.5
    noisy = base.family.attention_modules(base.model)[layer]
    draw = torch.Generator().manual_seed(0)

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        if module is noisy:
            x = key if side == "keys" else value
            noise = torch.randn(x.shape, generator=draw) * size
            key, value = (key + noise, value) if side == "keys" else (key, value + noise)
        return sdpa_attention_forward(module, query, key, value, *args, **kwargs)

    with torch.no_grad():
        expected = base.model(token_windows).logits
        with attending_by(base.model, "noisy", attend):
            found = [divergence(expected, base.model(token_windows).logits) for _ in range(4)]
    assert sum(found) / 4 == pytest.approx(1e-3, rel=0.15)


@pytest.fixture(scope="module")
def demo() -> tuple[Base, Tensor, Statistics]:
    """Return the embedded trained model, windows of the standard library, their statistics."""
    base = load(str(files("vdcompress.demo_model")))
    texts = (base.tokenizer(text)["input_ids"] for text in documents("training"))
    windows = torch.tensor(list(islice((t[:256] for t in texts if len(t) >= 256), 16)))
    return base, windows, calibrate(base, windows, needs=NEEDS | {"outputs", "output_gradients"})


@pytest.mark.parametrize(
    "request_",
    [
        Request(kv_budget=0.5),
        Request(v_dim=128, v_groups=1),
        Request(k_dim=128, k_groups=2),
    ],
    ids=lambda asked: asked.label(),
)
def test_a_trained_model_loses_about_what_is_predicted(
    demo: tuple[Base, Tensor, Statistics], request_: Request
) -> None:
    """Within a factor of three: keys, values and gradients are not independent."""
    base, windows, statistics = demo
    found = gains(base.shape, statistics)
    plan = plan_for(base.shape, request_, Start("fisher", "none", 0), found)
    predicted = sum(sum(layer.values()) for layer in predicted_loss(plan.layers, found))
    model = rewrite(base, plan, statistics)
    measured = evaluate(model, windows.flatten(), base=base.model, window=256, windows=6)
    assert measured.kl is not None
    assert predicted > 1e-4
    assert 1 / 3 < measured.kl / predicted < 3
