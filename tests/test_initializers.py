"""Initialisers: one contract for all that are found, and an independent oracle for each."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.linear_model import LinearRegression
from torch import Tensor

from vdcompress import initializers
from vdcompress.calibrate import EVERYTHING, calibrate
from vdcompress.errors import UsageError
from vdcompress.latents.lowrank import best_encoder, regression_decoder
from vdcompress.latents.refit import refit
from vdcompress.latents.values import Latents, ValueProblem, ValueWeights, fold
from vdcompress.load import Base
from vdcompress.plan import Start, make_plan
from vdcompress.rewrite import rewrite
from vdcompress.statistics import LayerStatistics, MomentSum, Statistics

D, HIDDEN, TOKENS = 8, 40, 3000
EXACT = {"atol": 1e-8, "rtol": 1e-8}


@dataclass(frozen=True)
class Layer:
    """A layer's V path and samples of what runs through it.

    Attributes:
        problem: what an initialiser gets.
        inputs: [n, hidden], what V is computed from.
        outputs: [n, H, d], what attention returns.
    """

    problem: ValueProblem
    inputs: Tensor
    outputs: Tensor

    @property
    def y(self) -> Tensor:
        """[n, hidden], what the base's output projection writes."""
        problem = self.problem
        return torch.einsum("nhd,hyd->ny", self.outputs, problem.o_weight) + problem.o_bias


def make_layer(
    heads: int = 4, groups: int = 4, width: int = 3, rank: int = HIDDEN, spread: float = 1.0
) -> Layer:
    """Draw a layer whose outputs have a mean, unequal variances and dependent heads."""
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    sharing = heads // groups
    inputs = (normal(TOKENS, rank) @ normal(rank, HIDDEN)) * spread + normal(HIDDEN)
    v_weight, v_bias = normal(groups, D, HIDDEN) / 6, normal(groups, D)
    o_weight, o_bias = normal(heads, HIDDEN, D) / 5, normal(HIDDEN)
    values = torch.einsum("nx,gdx->ngd", inputs, v_weight) + v_bias
    # each head averages other tokens: half of its own and half of a neighbour's value
    outputs = torch.stack(
        [
            0.5 * values[:, h // sharing] + 0.5 * values.roll(h + 1, dims=0)[:, h // sharing]
            for h in range(heads)
        ],
        dim=1,
    )
    seen = {"values": MomentSum(), "outputs": MomentSum()}
    seen["values"].add(values.flatten(1))
    seen["outputs"].add(outputs.flatten(1))
    statistics = LayerStatistics(**{name: total.moments() for name, total in seen.items()})
    generator = torch.Generator().manual_seed(1)
    problem = ValueProblem(v_weight, v_bias, o_weight, o_bias, width, statistics, generator)
    return Layer(problem, inputs, outputs)


def reconstruct(problem: ValueProblem, latents: Latents, outputs: Tensor) -> Tensor:
    """offset_h + D_h E_g (o_h - center_g) for o [n, H, d]."""
    encoder = latents.encoder.repeat_interleave(problem.sharing, dim=0)
    center = latents.center.repeat_interleave(problem.sharing, dim=0)
    small = torch.einsum("hrd,nhd->nhr", encoder, outputs - center)
    return latents.offset + torch.einsum("hdr,nhr->nhd", latents.decoder, small)


def apply(problem: ValueProblem, weights: ValueWeights, layer: Layer) -> Tensor:
    """Run folded weights as the model does: latents of every token, averaged, then projected."""
    latents = layer.inputs @ weights.v_weight.T + weights.v_bias
    latents = latents.unflatten(1, (len(problem.v_weight), -1))
    attended = [
        0.5 * latents[:, h // problem.sharing]
        + 0.5 * latents.roll(h + 1, dims=0)[:, h // problem.sharing]
        for h in range(len(problem.o_weight))
    ]
    return torch.cat(attended, dim=1) @ weights.o_weight.T + weights.o_bias


def encoder_of(problem: ValueProblem, weights: ValueWeights) -> Tensor:
    """Recover E [G, r, d] from v_weight = E W_v."""
    rows = weights.v_weight.unflatten(0, (len(problem.v_weight), -1))
    return rows @ torch.linalg.pinv(problem.v_weight)


def damage(layer: Layer, y: Tensor) -> float:
    """E|y - y'|^2."""
    return float((layer.y - y).square().sum(-1).mean())


def projector(rows: Tensor) -> Tensor:
    return rows.mT @ rows


SHAPES = [(4, 4), (4, 2), (4, 1)]
EVERY = pytest.mark.parametrize("name", initializers.available())
SHARED = pytest.mark.parametrize(("heads", "groups"), SHAPES, ids=["mha", "gqa", "mqa"])


# The contract.


def test_the_four_of_the_design_are_there() -> None:
    assert {"random", "svd", "pca", "optimal"} <= set(initializers.available())


@EVERY
def test_defaults_can_run(name: str) -> None:
    initializer = initializers.get(name)
    assert initializer.default_refit in ("none", "local")
    assert initializer.default_alternate >= 0
    assert initializer.needs <= EVERYTHING
    assert initializer.key_needs <= EVERYTHING


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UsageError, match="optimum") as caught:
        initializers.get("optimum")
    assert "optimal" in caught.value.hint
    with pytest.raises(UsageError):
        initializers.get("refit")


@EVERY
@SHARED
def test_shapes_and_orthonormal_encoders(name: str, heads: int, groups: int) -> None:
    latents = initializers.get(name).solve(make_layer(heads, groups).problem)
    assert latents.encoder.shape == (groups, 3, D)
    assert latents.decoder.shape == (heads, D, 3)
    assert latents.center.shape == (groups, D)
    assert latents.offset.shape == (heads, D)
    assert all(x.dtype == torch.float64 for x in vars(latents).values())
    identity = torch.eye(3, dtype=torch.float64).expand(groups, 3, 3)
    torch.testing.assert_close(latents.encoder @ latents.encoder.mT, identity, **EXACT)


@EVERY
@SHARED
def test_full_width_restores_every_output(name: str, heads: int, groups: int) -> None:
    layer = make_layer(heads, groups, width=D)
    latents = initializers.get(name).solve(layer.problem)
    far = layer.outputs * 3 + 7  # not only what calibration saw
    torch.testing.assert_close(reconstruct(layer.problem, latents, far), far, **EXACT)
    torch.testing.assert_close(
        apply(layer.problem, fold(layer.problem, latents), layer), layer.y, **EXACT
    )


@EVERY
@SHARED
def test_refit_at_full_width_changes_nothing(name: str, heads: int, groups: int) -> None:
    layer = make_layer(heads, groups, width=D)
    latents = initializers.get(name).solve(layer.problem)
    weights = refit(layer.problem, latents, 2)
    torch.testing.assert_close(apply(layer.problem, weights, layer), layer.y, **EXACT)


@EVERY
def test_only_what_it_needs_is_read(name: str) -> None:
    problem = make_layer().problem
    needs = initializers.get(name).needs
    some = {n: m if n in needs else None for n, m in vars(problem.statistics).items()}
    initializers.get(name).solve(replace(problem, statistics=LayerStatistics(**some)))
    if needs:
        with pytest.raises(UsageError, match="statistics hold no"):
            initializers.get(name).solve(replace(problem, statistics=LayerStatistics()))


@EVERY
@SHARED
def test_folded_weights_are_the_latents(name: str, heads: int, groups: int) -> None:
    """Folding is exact, because rows of attention sum to 1."""
    layer = make_layer(heads, groups)
    latents = initializers.get(name).solve(layer.problem)
    restored = replace(layer, outputs=reconstruct(layer.problem, latents, layer.outputs))
    weights = fold(layer.problem, latents)
    torch.testing.assert_close(apply(layer.problem, weights, layer), restored.y, **EXACT)


@pytest.mark.parametrize("name", ["pca", "optimal"])
@SHARED
def test_constant_shifts_cost_nothing(name: str, heads: int, groups: int) -> None:
    """What all tokens have in common is in the biases: the mean of y is exact."""
    layer = make_layer(heads, groups, width=1)
    weights = fold(layer.problem, initializers.get(name).solve(layer.problem))
    y = apply(layer.problem, weights, layer)
    torch.testing.assert_close(y.mean(0), layer.y.mean(0), **EXACT)
    still = make_layer(heads, groups, width=1, spread=0.0)
    weights = fold(still.problem, initializers.get(name).solve(still.problem))
    torch.testing.assert_close(apply(still.problem, weights, still), still.y, **EXACT)


@EVERY
@pytest.mark.parametrize("rounds", [None, 0, 2])
@pytest.mark.parametrize(("rank", "spread"), [(2, 1.0), (HIDDEN, 0.0), (HIDDEN, 1e-9)])
@SHARED
def test_singular_data(
    name: str, heads: int, groups: int, rank: int, spread: float, rounds: int | None
) -> None:
    layer = make_layer(heads, groups, width=5, rank=rank, spread=spread)
    problem = layer.problem
    latents = initializers.get(name).solve(problem)
    weights = fold(problem, latents) if rounds is None else refit(problem, latents, rounds)
    assert all(torch.isfinite(x).all() for x in vars(weights).values())
    if name in ("pca", "optimal"):  # 2 dimensions of variance fit into 5
        assert damage(layer, apply(problem, weights, layer)) < 1e-8 * layer.y.var()


def test_a_head_that_is_not_read() -> None:
    layer = make_layer()
    problem = replace(layer.problem, o_weight=layer.problem.o_weight * 0)
    latents = initializers.get("optimal").solve(problem)
    weights = refit(problem, latents, 2)
    assert all(torch.isfinite(x).all() for x in vars(weights).values())


# random


def test_random_follows_its_generator() -> None:
    problem = make_layer().problem
    solve = initializers.get("random").solve

    def draw(seed: int) -> Tensor:
        return solve(replace(problem, generator=torch.Generator().manual_seed(seed))).encoder

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    encoder = draw(1)
    assert not torch.allclose(encoder[0], encoder[1])


def test_random_differs_between_layers_and_seeds(base: Base, statistics: Statistics) -> None:
    def weights(seed: int) -> list[Tensor]:
        start = Start("random", "none", 0, seed=seed)
        model = rewrite(
            base, make_plan(base.shape, v_dim=8 * base.shape.kv_heads, start=start), statistics
        )
        return [t for n, t in model.state_dict().items() if n.endswith("v_compress.weight")]

    assert all(torch.equal(a, b) for a, b in zip(weights(1), weights(1), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(weights(1), weights(2), strict=True))


# svd


def test_svd_is_the_best_approximation_of_the_weights() -> None:
    problem = make_layer().problem
    encoder = initializers.get("svd").solve(problem).encoder
    for rows, weight in zip(encoder, problem.v_weight, strict=True):
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        torch.testing.assert_close(projector(rows), u[:, :3] @ u[:, :3].T, **EXACT)
        best = (u[:, :3] * s[:3]) @ vh[:3]
        torch.testing.assert_close(projector(rows) @ weight, best, **EXACT)


# pca


def test_pca_is_scikit_learns(base: Base, token_windows: Tensor, statistics: Statistics) -> None:
    taps = [base.family.value_tap(a) for a in base.family.attention_modules(base.model)]
    seen: list[Tensor] = []
    handles = [
        tap.module.register_forward_hook(lambda _m, _a, out, tap=tap: seen.append(tap.read(out)))
        for tap in taps
    ]
    with torch.no_grad():
        base.model.base_model(token_windows, use_cache=False)
    for handle in handles:
        handle.remove()
    for index, values in enumerate(seen):
        problem = replace(
            make_layer().problem,
            width=5,
            statistics=statistics.layers[index],
            o_weight=torch.zeros(base.shape.heads, 1, 16, dtype=torch.float64),
            v_weight=torch.zeros(base.shape.kv_heads, 16, 1, dtype=torch.float64),
        )
        latents = initializers.get("pca").solve(problem)
        for head in range(base.shape.kv_heads):
            oracle = PCA(5, svd_solver="full").fit(values[:, :, head].flatten(0, 1).double())
            expected = torch.from_numpy(oracle.components_)
            torch.testing.assert_close(
                projector(latents.encoder[head]), projector(expected), atol=1e-6, rtol=1e-6
            )
            torch.testing.assert_close(
                latents.center[head], torch.from_numpy(oracle.mean_), atol=1e-6, rtol=1e-6
            )


# optimal


def test_optimal_is_reduced_rank_regression() -> None:
    """W D E (o - mu) is the best rank-r prediction of W (o - mu): PCA of the head's output."""
    layer = make_layer()
    latents = initializers.get("optimal").solve(layer.problem)
    for head, weight in enumerate(layer.problem.o_weight):
        o = layer.outputs[:, head]
        oracle = PCA(3, svd_solver="full").fit((o @ weight.T).numpy())
        expected = torch.from_numpy(projector_of(oracle)) @ weight
        found = weight @ latents.decoder[head] @ latents.encoder[head]
        torch.testing.assert_close(found, expected, atol=1e-7, rtol=1e-7)


def projector_of(oracle: PCA) -> Any:
    return oracle.components_.T @ oracle.components_


def head_damage(layer: Layer, encoder: Tensor) -> float:
    """Sum over heads of E|W_o (o - o')|^2 with the best affine decoder of each head."""
    total, sharing = 0.0, layer.problem.sharing
    for head, weight in enumerate(layer.problem.o_weight):
        o = layer.outputs[:, head]
        small = (o @ encoder[head // sharing].T).numpy()
        restored = LinearRegression().fit(small, o.numpy()).predict(small)
        total += float(((o - torch.from_numpy(restored)) @ weight.T).square().sum(-1).mean())
    return total


def test_nothing_beats_the_optimum_of_a_head() -> None:
    layer = make_layer()
    best = initializers.get("optimal").solve(layer.problem)
    least = head_damage(layer, best.encoder)
    draw = torch.Generator().manual_seed(3)
    rivals = [initializers.get(n).solve(layer.problem).encoder for n in initializers.available()]
    for size in (0.01, 0.1, 1.0):
        for _ in range(5):
            noise = torch.randn(best.encoder.shape, generator=draw, dtype=torch.float64)
            rivals.append(torch.linalg.qr((best.encoder + size * noise).mT).Q.mT)
    for rival in rivals:
        assert head_damage(layer, rival) >= least * (1 - 1e-9)
    assert head_damage(layer, rivals[-1]) > 1.01 * least


@SHARED
def test_decoders_are_least_squares(heads: int, groups: int) -> None:
    layer = make_layer(heads, groups)
    latents = initializers.get("optimal").solve(layer.problem)
    for head in range(heads):
        o = layer.outputs[:, head].numpy()
        small = o @ latents.encoder[head // layer.problem.sharing].numpy().T
        wanted = np.linalg.lstsq(small - small.mean(0), o - o.mean(0), rcond=None)[0].T
        np.testing.assert_allclose(latents.decoder[head], wanted, atol=1e-8)
    restored = reconstruct(layer.problem, latents, layer.outputs)
    torch.testing.assert_close(restored.mean(0), layer.outputs.mean(0), **EXACT)


@pytest.mark.parametrize(("heads", "groups"), SHAPES[1:])
def test_shared_encoders_minimise_the_groups_damage(heads: int, groups: int) -> None:
    """Where a group's heads have one covariance, its encoder is the optimum for all of them."""
    layer = make_layer(heads, groups)
    mean, covariance = _equal_moments(layer)
    statistics = replace(
        layer.problem.statistics,
        outputs=replace(layer.problem.statistics.outputs, mean=mean, covariance=covariance),
    )
    problem = replace(layer.problem, statistics=statistics)
    encoder = initializers.get("optimal").solve(problem).encoder
    blocks = covariance.unflatten(0, (heads, D)).unflatten(2, (heads, D))

    def cost(rows: Tensor) -> float:
        total = 0.0
        for head, weight in enumerate(problem.o_weight):
            spread, e = blocks[head, :, head], rows[head // problem.sharing]
            decoder = spread @ e.T @ torch.linalg.inv(e @ spread @ e.T)
            left = weight @ (torch.eye(D, dtype=torch.float64) - decoder @ e)
            total += float((left @ spread @ left.T).trace())
        return total

    draw = torch.Generator().manual_seed(4)
    for size in (0.01, 0.1, 1.0):
        noise = torch.randn(encoder.shape, generator=draw, dtype=torch.float64)
        rival = torch.linalg.qr((encoder + size * noise).mT).Q.mT
        assert cost(rival) > cost(encoder)


def _equal_moments(layer: Layer) -> tuple[Tensor, Tensor]:
    heads, sharing = len(layer.problem.o_weight), layer.problem.sharing
    first = layer.outputs[:, ::sharing].repeat_interleave(sharing, dim=1).flatten(1)
    total = MomentSum()
    total.add(first)
    moments = total.moments()
    assert moments is not None
    assert heads * D == len(moments.mean)
    return moments.mean, moments.covariance


def test_encoders_of_singular_covariances_are_completed() -> None:
    draw = torch.Generator().manual_seed(5)
    x = torch.randn(100, 2, generator=draw, dtype=torch.float64)
    x = x @ torch.randn(2, D, generator=draw, dtype=torch.float64)
    covariance = x.T @ x / 100
    gram = torch.eye(D, dtype=torch.float64)
    encoder = best_encoder(gram, covariance, 5)
    torch.testing.assert_close(encoder @ encoder.T, torch.eye(5, dtype=torch.float64), **EXACT)
    torch.testing.assert_close(x @ projector(encoder), x, **EXACT)
    decoder = regression_decoder(encoder, covariance)
    torch.testing.assert_close(x @ encoder.T @ decoder.T, x, **EXACT)


# refit and alternation


@EVERY
@SHARED
def test_refit_is_a_linear_regression(name: str, heads: int, groups: int) -> None:
    layer = make_layer(heads, groups)
    problem = layer.problem
    latents = initializers.get(name).solve(problem)
    weights = refit(problem, latents)
    encoder = encoder_of(problem, weights).repeat_interleave(problem.sharing, dim=0)
    torch.testing.assert_close(
        encoder, latents.encoder.repeat_interleave(problem.sharing, dim=0), **EXACT
    )
    center = latents.center.repeat_interleave(problem.sharing, dim=0)
    small = torch.einsum("hrd,nhd->nhr", encoder, layer.outputs - center).flatten(1)
    oracle = LinearRegression().fit(small.numpy(), layer.y.numpy())
    np.testing.assert_allclose(weights.o_weight, oracle.coef_, atol=1e-4)
    np.testing.assert_allclose(weights.o_bias, oracle.intercept_, atol=1e-4)
    expected = torch.from_numpy(oracle.predict(small.numpy()))
    torch.testing.assert_close(apply(problem, weights, layer), expected, atol=1e-4, rtol=1e-4)


@EVERY
@SHARED
def test_repair_never_does_harm(name: str, heads: int, groups: int) -> None:
    layer = make_layer(heads, groups)
    problem = layer.problem
    latents = initializers.get(name).solve(problem)
    plain = damage(layer, apply(problem, fold(problem, latents), layer))
    errors = [
        damage(layer, apply(problem, refit(problem, latents, rounds), layer)) for rounds in range(4)
    ]
    assert errors[0] <= plain * (1 + 1e-9)
    for before, after in pairwise(errors):
        assert after <= before * (1 + 1e-9)
    assert errors[3] < 0.999 * errors[0]


@pytest.mark.parametrize(("heads", "groups"), SHAPES[:2])
def test_alternation_ends_at_one_error_from_every_start(heads: int, groups: int) -> None:
    layer = make_layer(heads, groups)
    errors = []
    for name in initializers.available():
        latents = initializers.get(name).solve(layer.problem)
        weights = refit(layer.problem, latents, 5)
        errors.append(damage(layer, apply(layer.problem, weights, layer)))
    assert max(errors) < 1.003 * min(errors)


# through the model


def test_the_optimum_is_ahead_on_the_layers_output(
    base: Base, token_windows: Tensor, statistics: Statistics
) -> None:
    """First layer only: its input is the base's, so the damage is what the mathematics says."""
    expected = _first_output(base, base.model, token_windows)
    errors = {}
    for name in initializers.available():
        for repair in ("none", "local"):
            start = Start(name, repair, 0)
            plan = make_plan(base.shape, v_dim=8 * base.shape.kv_heads, start=start)
            seen = _first_output(base, rewrite(base, plan, statistics), token_windows)
            errors[name, repair] = float((seen - expected).square().mean())
    for name in initializers.available():
        assert errors["optimal", "local"] <= errors[name, "local"] * 1.05
        assert errors[name, "local"] <= errors[name, "none"] * (1 + 1e-4)
        assert errors[name, "local"] < errors["random", "none"]


def _first_output(base: Base, model: Any, ids: Tensor) -> Tensor:
    seen: list[Tensor] = []
    module = base.family.output_projection(base.family.attention_modules(model)[0])
    handle = module.register_forward_hook(lambda _m, _a, out: seen.append(out))
    with torch.no_grad():
        model.base_model(ids, use_cache=False)
    handle.remove()
    return seen[0]


def test_calibration_feeds_the_oracle(base: Base, token_windows: Tensor) -> None:
    """Only asked-for moments are measured, and that is enough for the initialiser."""
    for name in initializers.available():
        needs = initializers.get(name).needs
        found = calibrate(base, token_windows, needs=needs, batch=8)
        layer = found.layers[0]
        assert {n for n, m in vars(layer).items() if m is not None} == needs
        plan = make_plan(base.shape, v_dim=base.shape.kv_heads * 8, start=Start(name, "none", 0))
        rewrite(base, plan, found)
