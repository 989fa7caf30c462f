"""The K path of a layer: what folded weights and maps behind RoPE do to the scores."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LinearRegression
from torch import Tensor

from drawn import Keys, make_keys, make_layer, moments, turned
from vdcompress import initializers
from vdcompress.errors import UsageError
from vdcompress.latents import keys as room
from vdcompress.latents.keys import KeyMetric, KeyWeights, centred, keep_keys, solve_keys
from vdcompress.modeling.layout import LayerLayout, NopePart, Part, RotaryPart
from vdcompress.plan import ModelShape
from vdcompress.statistics import LayerStatistics, QuerySample

EXACT = {"atol": 1e-8, "rtol": 1e-8}
SOME = 80  # tokens whose scores are compared
PARTIAL = ModelShape("gpt_neox", 1, hidden=24, heads=4, kv_heads=4, head_dim=10, rotary_dim=4)
WHOLE = ModelShape("llama", 1, hidden=24, heads=8, kv_heads=4, head_dim=6, rotary_dim=6)
EVERY = pytest.mark.parametrize("name", initializers.available())
GROUPS = pytest.mark.parametrize("groups", [4, 2, 1])
SHAPES = pytest.mark.parametrize("shape", [PARTIAL, WHOLE], ids=["folded", "behind"])


def layout(shape: ModelShape, groups: int, width: int, pairs: tuple[int, ...]) -> LayerLayout:
    """Keep ``width`` numbers per latent and these rotary pairs, behind RoPE for whole heads."""
    behind = shape.rotary_dim == shape.head_dim
    maps = "per_head" if behind else "folded"
    nope = NopePart(groups, width, maps=maps, after_rope=behind)
    rotary = RotaryPart(groups, 2 * len(pairs), maps=maps, frequencies=pairs)
    return LayerLayout(Part(shape.kv_heads, shape.head_dim), nope, rotary)


def full(shape: ModelShape, groups: int) -> LayerLayout:
    joined, rest = shape.kv_heads // groups, shape.head_dim - shape.rotary_dim
    if not rest:
        return layout(shape, groups, joined * shape.head_dim, ())
    pairs = tuple(index for index in range(shape.rotary_dim // 2) for _ in range(joined))
    return layout(shape, groups, joined * rest, pairs)


def narrow(shape: ModelShape, groups: int) -> LayerLayout:
    pairs = () if shape is WHOLE else (0, 1)
    return layout(shape, groups, 3, pairs)


def compressed(keys: Keys, weights: KeyWeights) -> tuple[Tensor, Tensor]:
    """Run new weights as the modelling files do: queries [n, H, k] and keys [n, g, k]."""
    problem, count = keys.problem, keys.problem.groups
    heads, behind = len(problem.q_weight), weights.k_compress is not None
    written = len(problem.k_weight) if behind else count
    q = (keys.inputs.roll(3, dims=0) @ weights.q_weight.T + weights.q_bias).unflatten(
        1, (heads, -1)
    )
    k = (keys.inputs @ weights.k_weight.T + weights.k_bias).unflatten(1, (written, -1))
    kept = problem.layout.k_rotary.frequencies
    frequencies = keys.frequencies if behind else keys.frequencies[list(kept)]
    q, k = (turned(x, keys.positions, frequencies) for x in (q, k))
    if behind:
        assert weights.q_expand is not None
        assert weights.k_shift is not None
        q = torch.einsum("nhd,hdr->nhr", q, weights.q_expand)
        k = torch.einsum("ngx,gxr->ngr", k.flatten(1).unflatten(1, (count, -1)), weights.k_compress)
        k = k + weights.k_shift.transpose(0, 1)
    return q, k


def scores(queries: Tensor, keys: Tensor) -> Tensor:
    """[H, SOME, SOME], without what one number per query cannot change in a softmax."""
    sharing = queries.shape[1] // keys.shape[1]
    k = keys[:SOME].repeat_interleave(sharing, dim=1)
    found = torch.einsum("nhd,mhd->hnm", queries[:SOME], k)
    return found - found.mean(-1, keepdim=True)


def solved(keys: Keys, metric: KeyMetric | None = None) -> Tensor:
    weights = solve_keys(keys.problem, metric or keys.metric)
    return scores(*compressed(keys, weights))


@SHAPES
@GROUPS
def test_full_width_has_the_bases_scores(shape: ModelShape, groups: int) -> None:
    keys = make_keys(shape, full(shape, groups))
    torch.testing.assert_close(solved(keys), scores(keys.queries, keys.keys), **EXACT)


@SHAPES
def test_kept_keys_are_the_bases(shape: ModelShape) -> None:
    keys = make_keys(shape, full(shape, shape.kv_heads))
    problem = replace(keys.problem, layout=replace(keys.problem.layout))
    weights = keep_keys(problem)
    assert weights.k_compress is weights.q_expand is weights.k_shift is None
    bare = replace(keys, problem=problem)
    if shape is WHOLE:
        every = RotaryPart(4, 6, frequencies=(0, 1, 2))
        bare = bare.with_layout(LayerLayout(Part(4, 6), NopePart(4, 0), every))
    found = scores(*compressed(bare, weights))
    torch.testing.assert_close(found, scores(keys.queries, keys.keys), **EXACT)


def explicit(keys: Keys, metric: KeyMetric) -> Tensor:
    """mu + D E (k - mu) of each key, [n, G, d]: kept frequencies whole, the rest by a projection.

    The encoder is read off the compressed keys, the decoder is scikit-learn's.
    """
    problem = keys.problem
    rotated = problem.rotary_dim if not problem.layout.k_nope.after_rope else 0
    _, small = compressed(keys, solve_keys(problem, metric))
    small = small[..., 2 * len(problem.layout.k_rotary.frequencies) :]
    found = keys.keys.clone()
    joined = problem.joined
    for latent in range(problem.groups):
        mine = slice(latent * joined, (latent + 1) * joined)
        x = keys.keys[:, mine, rotated:].flatten(1).numpy()
        z = small[:, latent].numpy()
        predicted = torch.from_numpy(LinearRegression().fit(z, x).predict(z))
        found[:, mine, rotated:] = predicted.unflatten(1, (joined, -1))
    return found


@SHAPES
@GROUPS
def test_scores_are_those_of_projected_keys(shape: ModelShape, groups: int) -> None:
    """Folded or behind RoPE, queries meet mu + D E (k - mu); decoders are least squares."""
    whole = full(shape, groups)
    keys = make_keys(shape, replace(whole, k_nope=replace(whole.k_nope, width=4)))
    expected = scores(keys.queries, explicit(keys, keys.metric))
    torch.testing.assert_close(solved(keys), expected, atol=1e-6, rtol=1e-6)
    assert (expected - scores(keys.queries, keys.keys)).abs().max() > 0.1


@GROUPS
def test_encoders_are_orthonormal_in_the_keys_own_space(groups: int) -> None:
    keys = make_keys(WHOLE, narrow(WHOLE, groups))
    weights = solve_keys(keys.problem, keys.metric)
    assert weights.k_compress is not None
    identity = torch.eye(3, dtype=torch.float64).expand(groups, 3, 3)
    torch.testing.assert_close(weights.k_compress.mT @ weights.k_compress, identity, **EXACT)


@SHAPES
@GROUPS
def test_a_constant_added_to_every_key_changes_nothing(shape: ModelShape, groups: int) -> None:
    """Centring is exact: the softmax does not see it, nor does the choice of directions."""
    found = []
    for shift in (0.0, 1000.0):
        keys = make_keys(shape, narrow(shape, groups))
        if shape is WHOLE:  # behind RoPE, where it is a constant
            moved = keys.keys + shift
            metric = KeyMetric(keys.metric.reading, moments(moved.flatten(1)).blocks(groups))
            weights = solve_keys(keys.problem, metric)
            assert weights.k_compress is not None
            assert weights.k_shift is not None
            small = moved.flatten(1).unflatten(1, (groups, -1))
            small = torch.einsum("ngx,gxr->ngr", small, weights.k_compress)
            small = small + weights.k_shift.transpose(0, 1)
            queries, _ = compressed(keys, weights)
            found.append(scores(queries, small))
            np.testing.assert_allclose(small.mean(0), 0, atol=1e-8)
        else:
            shifted = make_keys(shape, narrow(shape, groups), shift=shift)
            metric = KeyMetric(keys.metric.reading, shifted.metric.keys)
            queries, small = compressed(shifted, solve_keys(shifted.problem, metric))
            found.append(scores(queries, small))
            np.testing.assert_allclose(small[..., 4:].mean(0), 0, atol=1e-8)
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-5)


@GROUPS
def test_another_centre_is_its_second_moment(groups: int) -> None:
    keys = make_keys(PARTIAL, narrow(PARTIAL, groups))
    owned = keys.keys.flatten(1).unflatten(1, (groups, -1))
    center = torch.linspace(-1, 1, owned.shape[2], dtype=torch.float64).expand(groups, -1)
    found = centred(keys.metric.keys, center)
    x = owned - center
    torch.testing.assert_close(found.covariance, torch.einsum("ngx,ngy->gxy", x, x) / len(x))
    assert torch.equal(found.mean, center)


@SHAPES
def test_keys_that_no_query_reads(shape: ModelShape) -> None:
    """Zero queries and directions without variance make no NaN."""
    keys = make_keys(shape, narrow(shape, 2))
    metric = keys.metric
    nothing = replace(metric, reading=torch.zeros_like(metric.reading))
    assert torch.isfinite(solved(keys, nothing)).all()
    still = replace(metric.keys, covariance=torch.zeros_like(metric.keys.covariance))
    assert torch.isfinite(solved(keys, replace(metric, keys=still))).all()
    half = metric.reading.clone()
    half[:, : half.shape[1] // 2] = 0
    half[:, :, : half.shape[1] // 2] = 0
    assert torch.isfinite(solved(keys, replace(metric, reading=half))).all()


def test_directions_without_variance_cost_nothing() -> None:
    """Keys of rank 3 are whole in latents of 3 numbers."""
    keys = make_keys(WHOLE, narrow(WHOLE, 1))
    draw = torch.Generator().manual_seed(3)
    flat = torch.randn(len(keys.keys), 3, generator=draw, dtype=torch.float64)
    flat = flat @ torch.randn(3, 24, generator=draw, dtype=torch.float64)
    metric = KeyMetric(keys.metric.reading, moments(flat).blocks(1))
    weights = solve_keys(keys.problem, metric)
    assert weights.k_compress is not None
    assert weights.q_expand is not None
    small = flat @ weights.k_compress[0] + weights.k_shift
    queries = torch.einsum("nhd,hdr->nhr", keys.queries, weights.q_expand)
    found = scores(queries, small[0][:, None])
    torch.testing.assert_close(found, scores(keys.queries, flat.unflatten(1, (4, -1))), **EXACT)


# The contract of initialisers, and the theorem of those that weigh.


@EVERY
@pytest.mark.parametrize(
    ("heads", "groups", "latents"), [(4, 4, 4), (4, 2, 2), (4, 4, 2), (4, 2, 1)]
)
def test_metrics_have_the_shape_of_latents(
    name: str, heads: int, groups: int, latents: int
) -> None:
    problem = make_layer(heads, groups, latents=latents).keys_problem
    metric, n = initializers.get(name).keys(problem), 8 * groups // latents
    assert metric.reading.shape == metric.keys.covariance.shape == (latents, n, n)
    assert metric.keys.mean.shape == (latents, n)
    for matrix in (metric.reading, metric.keys.covariance):
        assert matrix.dtype == torch.float64
        torch.testing.assert_close(matrix, matrix.mT, **EXACT)
        assert torch.linalg.eigvalsh(matrix).min() > -1e-9
    assert all(
        x is None or torch.isfinite(x).all() for x in vars(solve_keys(problem, metric)).values()
    )


@EVERY
def test_only_what_a_metric_needs_is_read(name: str) -> None:
    problem, initializer = make_layer().keys_problem, initializers.get(name)
    statistics = vars(problem.statistics)
    some = {n: m if n in initializer.key_needs else None for n, m in statistics.items()}
    initializer.keys(replace(problem, statistics=LayerStatistics(**some)))
    for missing in initializer.key_needs:
        bare = LayerStatistics(**some | {missing: None})
        with pytest.raises(UsageError, match=f"hold no {missing}"):
            initializer.keys(replace(problem, statistics=bare))


def lost(keys: Keys, name: str, encoder: Tensor) -> float:
    """Sum over latents of what readers drawn apart see of k - k', by scikit-learn's decoder."""
    problem, total = keys.problem, 0.0
    joined, sharing = problem.joined, problem.sharing
    for latent, rows in enumerate(encoder):
        mine = slice(latent * joined, (latent + 1) * joined)
        x = keys.keys[:, mine].flatten(1)
        z = (x @ rows.T).numpy()
        error = x - torch.from_numpy(LinearRegression().fit(z, x.numpy()).predict(z))
        readers = [keys.gradients[:, mine].flatten(1)]
        if name == "optimal":
            readers = []
            for head in range(mine.start * sharing, mine.stop * sharing):
                place = head // sharing - mine.start
                alone = torch.zeros(len(x), joined, problem.k_weight.shape[1], dtype=x.dtype)
                alone[:, place] = keys.queries[:, head]
                readers.append(alone.flatten(1))
        spread = error.T @ error / len(error)
        total += sum(float((spread * (r.T @ r / len(r))).sum()) for r in readers)
    return total


@pytest.mark.parametrize("name", ["optimal", "fisher"])
@GROUPS
def test_nothing_beats_an_optimum_in_its_own_metric(name: str, groups: int) -> None:
    """Whole keys behind RoPE: queries for ``optimal``, the loss's gradients for ``fisher``."""
    keys = make_keys(WHOLE, narrow(WHOLE, groups))

    def encoder(of: str) -> Tensor:
        weights = solve_keys(keys.problem, initializers.get(of).keys(keys.problem))
        assert weights.k_compress is not None
        return weights.k_compress.mT

    best = encoder(name)
    least = lost(keys, name, best)
    draw = torch.Generator().manual_seed(2)
    for size in (0.01, 0.1, 1.0):
        noise = torch.randn(best.shape, generator=draw, dtype=torch.float64)
        assert lost(keys, name, best + size * noise) > least
    for other in initializers.available():
        assert lost(keys, name, encoder(other)) >= least * (1 - 1e-9)
    assert lost(keys, name, encoder("random")) > 1.05 * least


def test_svd_of_keys_is_that_of_the_weights() -> None:
    problem = make_layer(4, 2, latents=1).keys_problem
    found = initializers.get("svd").keys(problem)
    encoder = room.best_encoder(found.reading, found.keys.covariance, 3)[0]
    u, _, _ = torch.linalg.svd(problem.k_weight.flatten(0, 1), full_matrices=False)
    torch.testing.assert_close(encoder.T @ encoder, u[:, :3] @ u[:, :3].T, **EXACT)
    assert not found.keys.mean.any()


# Alternation is where it can help, and not elsewhere.


@pytest.mark.parametrize(("groups", "width", "runs"), [(4, 3, True), (2, 3, False), (4, 6, False)])
def test_keys_alternate_where_each_head_has_a_narrow_latent(
    monkeypatch: pytest.MonkeyPatch, groups: int, width: int, runs: bool
) -> None:
    keys = make_keys(WHOLE, layout(WHOLE, groups, width, ()))
    draw = torch.Generator().manual_seed(4)
    sample = QuerySample(*torch.randn(2, 8, 20, 6, generator=draw, dtype=torch.float64).unbind(0))
    statistics = replace(keys.problem.statistics, query_pulls=sample)
    called: list[int] = []

    def alternate(sample: QuerySample, e: Tensor, d: Tensor, rounds: int) -> tuple[Tensor, Tensor]:
        called.append(rounds)
        return e, d

    monkeypatch.setattr("vdcompress.latents.alternation.alternate", alternate)
    problem = replace(keys.problem, statistics=statistics)
    solve_keys(problem, keys.metric, 0)
    assert called == []
    solve_keys(problem, keys.metric, 3)
    assert called == [3] * runs
    solve_keys(keys.problem, keys.metric, 3)  # without a sample
    assert called == [3] * runs
