"""Rotary keys mixed within each frequency: what RoPE commutes with, and the best of it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from drawn import Keys, make_keys, moments, turned
from vdcompress.latents import rotary
from vdcompress.latents.keys import KeyMetric
from vdcompress.latents.rotary import Pairs
from vdcompress.modeling.layout import LayerLayout, NopePart, Part, RotaryPart
from vdcompress.modeling.rope import of_frequencies, rotate
from vdcompress.plan import ModelShape

EXACT = {"atol": 1e-9, "rtol": 1e-9}
POSITIONS = (0, 1, 17, 1000, 100_000)
KEPT = (0, 0, 1, 2, 2, 2)  # virtual heads of three frequencies; the fourth is dropped
SHAPE = ModelShape("gpt_neox", 1, hidden=24, heads=8, kv_heads=4, head_dim=10, rotary_dim=8)
HEADS = SHAPE.kv_heads
GROUPED = pytest.mark.parametrize("groups", [1, 2])


def layer(frequencies: tuple[int, ...], groups: int = 1) -> Keys:
    """Return a layer whose latents keep these rotary pairs of its four frequencies."""
    part = RotaryPart(groups, 2 * len(frequencies), frequencies=frequencies)
    return make_keys(SHAPE, LayerLayout(Part(HEADS, 10), NopePart(groups, 4), part))


def solved(keys: Keys) -> Pairs:
    problem = keys.problem
    frequencies = problem.layout.k_rotary.frequencies
    return rotary.solve(keys.metric, frequencies, SHAPE.rotary_dim, problem.joined)


def mixed(x: Tensor, pairs: Pairs) -> Tensor:
    """E z of keys x [n, G, d] as real pairs [n, g, 2 P], one virtual head after the other."""
    joined = x.shape[1] // len(pairs.encoder)
    latents = []
    for latent, encoder in enumerate(pairs.encoder):
        first, second = [], []
        for row, frequency in zip(encoder, pairs.frequencies, strict=True):
            z = torch.zeros(len(x), dtype=torch.complex128)
            for head in range(joined):
                own = x[:, latent * joined + head]
                z += row[head] * torch.complex(own[:, frequency], own[:, frequency + 4])
            first.append(z.real)
            second.append(z.imag)
        latents.append(torch.stack(first + second, dim=1))
    return torch.stack(latents, dim=1)


def restored(x: Tensor, pairs: Pairs) -> Tensor:
    """The rotated dimensions [n, G, 2 F] that D E z stands for."""
    small, count = mixed(x, pairs), len(pairs.frequencies)
    joined, found = x.shape[1] // len(pairs.encoder), torch.zeros_like(x[..., :8])
    for head in range(x.shape[1]):
        latent, own = head // joined, pairs.decoder[head // joined, head % joined]
        for place, frequency in enumerate(pairs.frequencies):
            c = torch.complex(small[:, latent, place], small[:, latent, place + count])
            z = own[place] * c
            found[:, head, frequency] += z.real
            found[:, head, frequency + 4] += z.imag
    return found


@GROUPED
@pytest.mark.parametrize("position", POSITIONS)
def test_mixing_commutes_with_rope(position: int, groups: int) -> None:
    keys = layer(KEPT if groups == 1 else (0, 1, 2, 2), groups)
    pairs = solved(keys)
    places = torch.full_like(keys.positions, position)
    mixed_first = turned(mixed(keys.keys, pairs), places, keys.frequencies[list(pairs.frequencies)])
    turned_first = mixed(turned(keys.keys, places, keys.frequencies), pairs)
    assert (mixed_first - turned_first).norm() <= 1e-6 * turned_first.norm()
    assert position == 0 or (turned_first - mixed(keys.keys, pairs)).norm() > 0.1


@pytest.mark.parametrize("position", POSITIONS)
def test_mixing_commutes_with_the_models_own_rope(position: int) -> None:
    """In float32, with the angles that the modelling files take."""
    keys = layer(KEPT)
    pairs = solved(keys)
    angles = torch.tensor([[position]])[..., None].float() * keys.frequencies.float()
    cos, sin = angles.cos(), angles.sin()
    kept = list(pairs.frequencies)
    own = Pairs(pairs.frequencies, pairs.encoder.to(torch.complex64), pairs.decoder)
    x = keys.keys[:50].float()
    first = rotate(mixed(x, own).transpose(0, 1)[None].float(), cos[..., kept], sin[..., kept])
    second = mixed(rotate(x.transpose(0, 1)[None], cos, sin)[0].transpose(0, 1), own)
    assert (first[0].transpose(0, 1) - second).norm() <= 1e-6 * second.norm()


@pytest.mark.parametrize("kept", [(), (2,), (0, 0, 3), (0, 1, 2, 3)])
def test_cos_and_sin_of_kept_frequencies(kept: tuple[int, ...]) -> None:
    cos, sin = torch.rand(2, 5, 4), torch.rand(2, 5, 4)
    with torch.inference_mode():  # what is kept for later must not be for inference alone
        of_frequencies(cos, sin, kept)
    sin.requires_grad_()
    found = of_frequencies(cos, sin, kept)
    for own, whole in zip(found, (cos, sin), strict=True):
        assert torch.equal(
            own, torch.stack([whole[..., i] for i in kept], -1) if kept else whole[..., :0]
        )
    found[1].sum().backward()


@GROUPED
def test_folded_rows_write_and_read_the_virtual_heads(groups: int) -> None:
    """q'^T k' of the folded projections is Re(conj(q) D E z), at the positions of both."""
    keys = layer(KEPT if groups == 1 else (0, 1, 2, 2), groups)
    problem, pairs = keys.problem, solved(keys)
    sharing, rotated = problem.sharing, SHAPE.rotary_dim
    k_weight, k_bias = rotary.write(problem.k_weight, problem.k_bias, pairs, rotated, groups)
    q_weight, q_bias = rotary.read(problem.q_weight, problem.q_bias, pairs, rotated, sharing)
    frequencies = keys.frequencies[list(pairs.frequencies)]
    small_k = torch.einsum("nx,grx->ngr", keys.inputs, k_weight) + k_bias
    small_q = torch.einsum("nx,hrx->nhr", keys.inputs.roll(3, dims=0), q_weight) + q_bias
    small_k, small_q = (turned(x, keys.positions, frequencies) for x in (small_k, small_q))
    torch.testing.assert_close(small_k, mixed(keys.keys, pairs), **EXACT)
    explicit, small_k, small_q = restored(keys.keys, pairs)[:50], small_k[:50], small_q[:50]
    for head in range(SHAPE.heads):
        wanted = keys.queries[:50, head, :rotated] @ explicit[:, head // sharing].T
        found = small_q[:, head] @ small_k[:, head * groups // SHAPE.heads].T
        torch.testing.assert_close(found, wanted, **EXACT)


def test_full_width_is_the_identity() -> None:
    keys = layer((0,) * 4 + (1,) * 4 + (2,) * 4 + (3,) * 4)
    torch.testing.assert_close(restored(keys.keys, solved(keys)), keys.keys[..., :8], **EXACT)


def test_no_rotary_dimension_may_be_left() -> None:
    pairs = solved(layer(()))
    assert pairs.encoder.shape == (1, 0, 4)
    assert pairs.decoder.shape == (1, 4, 0)


def test_moments_do_not_see_the_phase() -> None:
    """Complex moments behind RoPE are those before it; only the plain part E[z z] is lost."""
    keys = layer(KEPT)
    problem = keys.problem
    before = torch.einsum("nx,gdx->ngd", keys.inputs, problem.k_weight) + problem.k_bias
    _, spread = rotary.complex_moments(keys.metric, SHAPE.rotary_dim, HEADS)
    for frequency in range(4):
        z = torch.complex(before[..., frequency], before[..., frequency + 4])
        torch.testing.assert_close(spread[0, frequency], z.mT @ z.conj() / len(z), **EXACT)


# The optimum, against real matrices with the structure of complex ones.


def structured(a: Tensor) -> Tensor:
    """[m, m] complex -> [2 m, 2 m] real: what it does to (x, y)."""
    return torch.cat((torch.cat((a.real, -a.imag), 1), torch.cat((a.imag, a.real), 1)))


def phases(x: Tensor, frequency: int, count: int = 1) -> Tensor:
    """(x, y) of all heads at one frequency [n count, 2 m], turned by equally spread phases."""
    z = torch.complex(x[..., frequency], x[..., frequency + 4])
    angles = torch.arange(count, dtype=torch.float64) * 2 * torch.pi / count
    z = (torch.exp(1j * angles)[:, None, None] * z).flatten(0, 1)
    return torch.cat((z.real, z.imag), dim=1)


@pytest.mark.parametrize("frequency", [0, 3])
def test_each_frequency_keeps_its_best_real_subspace(frequency: int) -> None:
    """Under evenly spread phases the best real latent of 2 m numbers is complex-linear anyway."""
    keys = layer((frequency,) * 2)
    pairs = solved(keys)
    x, g = (phases(t, frequency, 8) for t in (keys.keys, keys.gradients))
    spread, reading = x.T @ x / len(x), g.T @ g / len(g)
    root = torch.linalg.cholesky(reading)
    u, s, _ = torch.linalg.svd(root.T @ torch.linalg.cholesky(spread))
    best = u[:, :4] @ u[:, :4].T  # of what reads: root^T D E (x, y) is its projection
    encoder, decoder = pairs.encoder[0], pairs.decoder[0]
    found = structured(decoder @ encoder)
    torch.testing.assert_close(root.T @ found, best @ root.T, atol=1e-7, rtol=1e-7)
    left = root.T @ (torch.eye(8, dtype=torch.float64) - found) @ torch.linalg.cholesky(spread)
    assert float(left.square().sum()) == pytest.approx(float(s[4:].square().sum()))


@GROUPED
def test_gains_are_the_error_over_random_phases(groups: int) -> None:
    """What is left out adds up to E(g^T e)^2 with keys and gradients drawn apart."""
    keys = layer(KEPT if groups == 1 else (0, 1, 2, 2), groups)
    joined, pairs = HEADS // groups, solved(keys)
    saved = rotary.gains(keys.metric, SHAPE.rotary_dim, joined)
    assert saved.shape == (groups, 4, joined)
    assert bool((saved[..., :-1] >= saved[..., 1:]).all())
    error = keys.keys[..., :8] - restored(keys.keys, pairs)
    for latent in range(groups):
        mine = slice(latent * joined, (latent + 1) * joined)
        for frequency in range(4):
            kept = pairs.frequencies.count(frequency)
            e, g = (phases(t[:, mine], frequency, 8) for t in (error, keys.gradients))
            measured = float(((e.T @ e / len(e)) * (g.T @ g / len(g))).sum())
            assert float(saved[latent, frequency, kept:].sum()) == pytest.approx(measured)


def test_frequencies_do_not_mix_in_the_metric() -> None:
    """What one frequency does says nothing about another's latents."""
    keys = layer(KEPT)
    other = keys.keys.clone()
    other[..., 3] *= 100
    other[..., 7] *= 100
    changed = KeyMetric(keys.metric.reading, moments(other.flatten(1)).blocks(1))
    found = rotary.solve(changed, KEPT, SHAPE.rotary_dim, HEADS)
    assert torch.equal(found.encoder, solved(keys).encoder)


@GROUPED
def test_nothing_beats_the_optimum(groups: int) -> None:
    keys = layer((0, 1, 2, 2), groups)
    pairs, metric = solved(keys), keys.metric
    joined = HEADS // groups
    reading, spread = rotary.complex_moments(metric, SHAPE.rotary_dim, joined)

    def cost(encoder: Tensor) -> float:
        total = 0.0
        for frequency in sorted(set(pairs.frequencies)):
            rows = [place for place, kept in enumerate(pairs.frequencies) if kept == frequency]
            for m, c, e in zip(reading[:, frequency], spread[:, frequency], encoder, strict=True):
                own = e[rows]
                decoder = c @ own.mH @ torch.linalg.inv(own @ c @ own.mH)
                left = torch.eye(joined, dtype=own.dtype) - decoder @ own
                total += float((m @ left @ c @ left.mH).trace().real)
        return total

    draw = torch.Generator().manual_seed(1)
    least = cost(pairs.encoder)
    for size in (0.01, 0.1, 1.0):
        noise = torch.randn(pairs.encoder.shape, generator=draw, dtype=torch.complex128)
        assert cost(pairs.encoder + size * noise) > least
