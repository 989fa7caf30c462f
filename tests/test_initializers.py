"""Initialisers: one contract for all that are found, and an independent oracle for each."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.linear_model import LinearRegression
from torch import Tensor

from drawn import HIDDEN, TOKENS, D, Layer, make_layer, mixed
from observed import observe
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

EXACT = {"atol": 1e-8, "rtol": 1e-8}


def reconstruct(layer: Layer, latents: Latents) -> Tensor:
    """offset_h + D_h E (v - center) for the stacked values v that each head averages, [n, H, d]."""
    sharing = layer.problem.sharing
    encoder = latents.encoder.repeat_interleave(sharing, dim=0)
    center = latents.center.repeat_interleave(sharing, dim=0)
    small = torch.einsum("hrd,nhd->nhr", encoder, layer.stacked - center)
    return latents.offset + torch.einsum("hdr,nhr->nhd", latents.decoder, small)


def apply(problem: ValueProblem, weights: ValueWeights, layer: Layer) -> Tensor:
    """Run folded weights as the model does: latents of every token, averaged, then projected."""
    latents = layer.inputs @ weights.v_weight.T + weights.v_bias
    latents = latents.unflatten(1, (len(problem.v_weight), -1))
    heads = range(len(problem.o_weight))
    attended = [mixed(latents[:, head // problem.sharing], head) for head in heads]
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
CENTRED = ("pca", "optimal", "fisher")
WEIGHED = pytest.mark.parametrize("name", ["optimal", "fisher"])
EVERY = pytest.mark.parametrize("name", initializers.available())
SHARED = pytest.mark.parametrize(("heads", "groups"), SHAPES, ids=["mha", "gqa", "mqa"])
JOINED = pytest.mark.parametrize(
    ("heads", "groups", "latents"),
    [*((heads, groups, groups) for heads, groups in SHAPES), (4, 4, 2), (4, 4, 1), (4, 2, 1)],
    ids=["mha", "gqa", "mqa", "mha-2", "mha-1", "gqa-1"],
)


# The contract.


def test_those_of_the_design_are_there() -> None:
    assert {"random", "svd", "pca", "optimal", "fisher"} <= set(initializers.available())


@EVERY
def test_defaults_can_run(name: str) -> None:
    initializer = initializers.get(name)
    assert initializer.default_refit in ("none", "local")
    assert initializer.default_alternate >= 0
    assert initializer.needs | (initializer.shared_needs or frozenset()) <= EVERYTHING
    assert initializer.key_needs <= EVERYTHING


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UsageError, match="optimum") as caught:
        initializers.get("optimum")
    assert "optimal" in caught.value.hint
    with pytest.raises(UsageError):
        initializers.get("refit")


@EVERY
@JOINED
def test_shapes_and_orthonormal_encoders(name: str, heads: int, groups: int, latents: int) -> None:
    n = D * groups // latents
    found = initializers.get(name).solve(make_layer(heads, groups, latents=latents).problem)
    assert found.encoder.shape == (latents, 3, n)
    assert found.decoder.shape == (heads, D, 3)
    assert found.center.shape == (latents, n)
    assert found.offset.shape == (heads, D)
    assert all(x.dtype == torch.float64 for x in vars(found).values())
    identity = torch.eye(3, dtype=torch.float64).expand(latents, 3, 3)
    torch.testing.assert_close(found.encoder @ found.encoder.mT, identity, **EXACT)


@EVERY
@JOINED
def test_full_width_restores_every_output(name: str, heads: int, groups: int, latents: int) -> None:
    layer = make_layer(heads, groups, width=D * groups // latents, latents=latents)
    found = initializers.get(name).solve(layer.problem)
    # not only what calibration saw
    far = replace(layer, values=layer.values * 3 + 7, outputs=layer.outputs * 3 + 7)
    torch.testing.assert_close(reconstruct(far, found), far.outputs, **EXACT)
    torch.testing.assert_close(
        apply(layer.problem, fold(layer.problem, found), layer), layer.y, **EXACT
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
@JOINED
def test_folded_weights_are_the_latents(name: str, heads: int, groups: int, latents: int) -> None:
    """Folding is exact, because rows of attention sum to 1."""
    layer = make_layer(heads, groups, latents=latents)
    found = initializers.get(name).solve(layer.problem)
    restored = replace(layer, outputs=reconstruct(layer, found))
    weights = fold(layer.problem, found)
    torch.testing.assert_close(apply(layer.problem, weights, layer), restored.y, **EXACT)


@pytest.mark.parametrize("name", CENTRED)
@JOINED
def test_constant_shifts_cost_nothing(name: str, heads: int, groups: int, latents: int) -> None:
    """What all tokens have in common is in the biases: the mean of y is exact."""
    layer = make_layer(heads, groups, width=1, latents=latents)
    weights = fold(layer.problem, initializers.get(name).solve(layer.problem))
    y = apply(layer.problem, weights, layer)
    torch.testing.assert_close(y.mean(0), layer.y.mean(0), **EXACT)
    still = make_layer(heads, groups, width=1, spread=0.0, latents=latents)
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
    assert all(x is None or torch.isfinite(x).all() for x in vars(weights).values())
    if name in CENTRED:  # 2 dimensions of variance fit into 5
        assert damage(layer, apply(problem, weights, layer)) < 1e-8 * layer.y.var()


def test_a_head_that_is_not_read() -> None:
    layer = make_layer()
    problem = replace(layer.problem, o_weight=layer.problem.o_weight * 0)
    latents = initializers.get("optimal").solve(problem)
    weights = refit(problem, latents, 2)
    assert all(x is None or torch.isfinite(x).all() for x in vars(weights).values())


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


@pytest.mark.parametrize("latents", [None, 1], ids=["own", "shared"])
def test_pca_is_scikit_learns(
    base: Base, token_windows: Tensor, statistics: Statistics, latents: int | None
) -> None:
    count = latents or base.shape.kv_heads
    n = base.shape.kv_dim // count
    for seen, measured in zip(observe(base, token_windows), statistics.layers, strict=True):
        values = seen.values.flatten(2).unflatten(2, (count, n))
        problem = replace(
            make_layer().problem,
            width=5,
            statistics=measured,
            o_weight=torch.zeros(base.shape.heads, 1, 16, dtype=torch.float64),
            v_weight=torch.zeros(count, n, 1, dtype=torch.float64),
        )
        found = initializers.get("pca").solve(problem)
        for latent in range(count):
            oracle = PCA(5, svd_solver="full").fit(values[:, :, latent].flatten(0, 1).double())
            expected = torch.from_numpy(oracle.components_)
            torch.testing.assert_close(
                projector(found.encoder[latent]), projector(expected), atol=1e-6, rtol=1e-6
            )
            torch.testing.assert_close(
                found.center[latent], torch.from_numpy(oracle.mean_), atol=1e-6, rtol=1e-6
            )


# optimal and fisher: one theorem, each in its own metric


def readers(layer: Layer, name: str) -> list[Tensor]:
    """Return what reads an error, [k, n] for each query head, or for each shared latent.

    The squares of what they read add up to what the initialiser makes small: E|W_o e|^2 for
    ``optimal``; for ``fisher`` E(g^T e)^2 with gradients g and errors e of tokens drawn apart.
    """
    problem = layer.problem
    if name == "optimal" and problem.joined == 1:
        return list(problem.o_weight)
    if name == "fisher":
        owned = layer.value_gradients.flatten(1).unflatten(1, (problem.groups, -1))
        seen = layer.output_gradients if problem.joined == 1 else owned
        return [torch.linalg.qr(g / TOKENS**0.5).R for g in seen.unbind(1)]
    repeated = problem.sharing // problem.joined
    heads = [
        torch.cat(list(problem.o_weight[head : head + repeated]))
        for head in range(0, len(problem.o_weight), repeated)
    ]
    joined = problem.joined
    return [torch.block_diag(*heads[i : i + joined]) for i in range(0, len(heads), joined)]


def read_samples(layer: Layer) -> list[Tensor]:
    """Return samples [tokens, n] of what each of the readers reads."""
    if layer.problem.joined == 1:
        return list(layer.outputs.unbind(1))
    return list(layer.values.flatten(1).unflatten(1, (layer.problem.groups, -1)).unbind(1))


def own_cost(layer: Layer, name: str, encoder: Tensor) -> float:
    """Sum what readers see of x - x', with the best affine decoder of each: scikit-learn's."""
    total, samples = 0.0, read_samples(layer)
    for index, (reader, x) in enumerate(zip(readers(layer, name), samples, strict=True)):
        small = (x @ encoder[index * len(encoder) // len(samples)].T).numpy()
        restored = LinearRegression().fit(small, x.numpy()).predict(small)
        total += float(((x - torch.from_numpy(restored)) @ reader.T).square().sum(-1).mean())
    return total


OWN_OR_SHARED = pytest.mark.parametrize("latents", [4, 2, 1], ids=["own", "two", "one"])


@WEIGHED
@OWN_OR_SHARED
def test_the_optimum_is_reduced_rank_regression(name: str, latents: int) -> None:
    """R D E (x - mu) is the best rank-r prediction of R (x - mu): PCA of what the reader sees."""
    layer = make_layer(latents=latents, width=5)
    found = initializers.get(name).solve(layer.problem)
    parts = layer.problem.joined
    decoders = found.decoder.unflatten(0, (latents, parts)).flatten(1, 2)
    for index, (reader, x) in enumerate(
        zip(readers(layer, name), read_samples(layer), strict=True)
    ):
        oracle = PCA(5, svd_solver="full").fit((x @ reader.T).numpy())
        kept = torch.from_numpy(oracle.components_)
        predicted = reader @ decoders[index] @ found.encoder[index]
        torch.testing.assert_close(predicted, projector(kept) @ reader, atol=1e-7, rtol=1e-7)


@WEIGHED
@OWN_OR_SHARED
def test_nothing_beats_an_optimum_in_its_own_metric(name: str, latents: int) -> None:
    layer = make_layer(latents=latents)
    best = initializers.get(name).solve(layer.problem).encoder
    least = own_cost(layer, name, best)
    draw = torch.Generator().manual_seed(3)
    rivals = [initializers.get(n).solve(layer.problem).encoder for n in initializers.available()]
    for size in (0.01, 0.1, 1.0):
        for _ in range(3):
            noise = torch.randn(best.shape, generator=draw, dtype=torch.float64)
            rivals.append(torch.linalg.qr((best + size * noise).mT).Q.mT)
    costs = [own_cost(layer, name, rival) for rival in rivals]
    assert min(costs) >= least * (1 - 1e-9)
    assert costs[-1] > 1.01 * least
    others = zip(initializers.available(), costs, strict=False)
    assert all(cost > 1.001 * least for other, cost in others if other != name)


@WEIGHED
@SHARED
def test_decoders_are_least_squares(name: str, heads: int, groups: int) -> None:
    layer = make_layer(heads, groups)
    latents = initializers.get(name).solve(layer.problem)
    for head in range(heads):
        o = layer.outputs[:, head].numpy()
        small = o @ latents.encoder[head // layer.problem.sharing].numpy().T
        wanted = np.linalg.lstsq(small - small.mean(0), o - o.mean(0), rcond=None)[0].T
        np.testing.assert_allclose(latents.decoder[head], wanted, atol=1e-8)
    restored = reconstruct(layer, latents)
    torch.testing.assert_close(restored.mean(0), layer.outputs.mean(0), **EXACT)


@WEIGHED
@pytest.mark.parametrize(("groups", "latents"), [(4, 2), (4, 1), (2, 1)])
def test_shared_decoders_are_least_squares(name: str, groups: int, latents: int) -> None:
    layer = make_layer(4, groups, latents=latents)
    found = initializers.get(name).solve(layer.problem)
    repeated = 4 // groups
    for latent, x in enumerate(read_samples(layer)):
        small = x.numpy() @ found.encoder[latent].numpy().T
        wanted = LinearRegression().fit(small, x.numpy()).coef_.reshape(-1, D, 3)
        first = latent * layer.problem.sharing
        mine = found.decoder[first : first + layer.problem.sharing]
        np.testing.assert_allclose(mine, wanted.repeat(repeated, axis=0), atol=1e-8)


@WEIGHED
@pytest.mark.parametrize(("heads", "groups"), SHAPES[1:])
def test_shared_encoders_minimise_the_groups_damage(name: str, heads: int, groups: int) -> None:
    """Where a group's heads have one covariance, its encoder is the optimum for all of them."""
    layer = make_layer(heads, groups)
    mean, covariance = _equal_moments(layer)
    statistics = replace(
        layer.problem.statistics,
        outputs=replace(layer.problem.statistics.outputs, mean=mean, covariance=covariance),
    )
    problem = replace(layer.problem, statistics=statistics)
    encoder = initializers.get(name).solve(problem).encoder
    blocks = covariance.unflatten(0, (heads, D)).unflatten(2, (heads, D))

    def cost(rows: Tensor) -> float:
        total = 0.0
        for head, weight in enumerate(readers(layer, name)):
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
