"""Alternation of keys with queries: each half step is a regression, and dependence is found."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from vdcompress.latents import alternation
from vdcompress.latents.alternation import RIDGE, alternate
from vdcompress.latents.lowrank import best_encoder, regression_decoder
from vdcompress.statistics import QuerySample

TOKENS, N, WIDTH = 400, 6, 2
SHARING = pytest.mark.parametrize("sharing", [1, 2], ids=["mha", "gqa"])


def sample(heads: int, n: int = N, tokens: int = TOKENS) -> QuerySample:
    """Draw queries and pulls that depend on each other, of unequal variances."""
    draw = torch.Generator().manual_seed(11)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=draw, dtype=torch.float64)

    scale = torch.logspace(0, -1, n, dtype=torch.float64)
    queries = (normal(heads, tokens, n) * scale) @ normal(heads, n, n)
    where = queries.abs() > queries.abs().mean()  # far queries pull elsewhere than near ones
    pulls = (normal(heads, tokens, n) * scale * (0.3 + where)) @ normal(heads, n, n)
    return QuerySample(queries, pulls)


def independent(given: QuerySample, sharing: int, width: int) -> tuple[Tensor, Tensor]:
    """Return the optimum for queries and pulls drawn apart: E [G, r, n] and D_h [H, n, r]."""
    queries, pulls = given.queries.double(), given.pulls.double()
    reading = (queries.mT @ queries / queries.shape[1]).unflatten(0, (-1, sharing)).sum(1)
    spread = (pulls.mT @ pulls / pulls.shape[1]).unflatten(0, (-1, sharing)).sum(1)
    encoder = best_encoder(reading, spread, width)
    decoder = regression_decoder(encoder, spread)
    return encoder, decoder.repeat_interleave(sharing, dim=0)


def error(given: QuerySample, encoder: Tensor, decoder: Tensor) -> float:
    """Sum of (m^T (I - E^T D^T) q)^2, token by token as matrices."""
    total, sharing = 0.0, len(decoder) // len(encoder)
    for head, read in enumerate(decoder.double()):
        left = torch.eye(read.shape[0], dtype=torch.float64) - (
            encoder[head // sharing].double().T @ read.T
        )
        m, q = given.pulls[head].double(), given.queries[head].double()
        total += float(torch.einsum("ti,ij,tj->t", m, left, q).square().sum())
    return total


def explicit(x: Tensor, z: Tensor, wanted: Tensor, prior: Tensor, sharing: int) -> Tensor:
    """Fit wanted ~ x^T X z by least squares on all products x_i z_j, ridge rows below."""
    found = []
    for group, start in enumerate(prior):
        mine = slice(group * sharing, (group + 1) * sharing)
        features = torch.einsum("hti,htj->htij", x[mine], z[mine]).flatten(2).flatten(0, 1)
        ridge = RIDGE * features.square().sum(0).mean()
        unknowns = features.shape[1]
        rows = torch.cat((features, ridge.sqrt() * torch.eye(unknowns, dtype=x.dtype)))
        left = wanted[mine].flatten() - features @ start.flatten()
        target = torch.cat((left, torch.zeros(unknowns, dtype=x.dtype)))
        step = torch.linalg.lstsq(rows, target[:, None]).solution
        found.append(start + step.view_as(start))
    return torch.stack(found)


def test_the_decoders_step_is_least_squares() -> None:
    """With E fixed: every query head has its own D_h."""
    given = sample(4)
    encoder, decoder = independent(given, 2, WIDTH)
    latents = given.pulls @ encoder.repeat_interleave(2, dim=0).mT
    wanted = (given.queries * given.pulls).sum(-1)
    found = alternation._regress(given.queries, latents, wanted, decoder, 1)
    expected = explicit(given.queries, latents, wanted, decoder, 1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert (found - decoder).norm() > 0.01 * decoder.norm()


@SHARING
def test_the_encoders_step_is_least_squares(sharing: int) -> None:
    """With the D_h fixed: query heads of one latent have one E together."""
    given = sample(4)
    encoder, decoder = independent(given, sharing, WIDTH)
    latents = given.queries @ decoder
    wanted = (given.queries * given.pulls).sum(-1)
    found = alternation._regress(given.pulls, latents, wanted, encoder.mT, sharing)
    expected = explicit(given.pulls, latents, wanted, encoder.mT, sharing)
    assert found.shape == (4 // sharing, N, WIDTH)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert (found.mT - encoder).norm() > 0.01 * encoder.norm()


@SHARING
def test_the_error_never_rises(sharing: int) -> None:
    given = sample(4)
    start = independent(given, sharing, WIDTH)
    errors = [error(given, *alternate(given, *start, rounds)) for rounds in range(5)]
    assert errors[0] == pytest.approx(error(given, *start), rel=1e-5)
    for before, after in pairwise(errors):
        assert after <= before * (1 + 1e-5)
    assert errors[4] < 0.95 * errors[0]


@SHARING
def test_latents_stay_orthonormal_and_exact(sharing: int) -> None:
    given = sample(4)
    encoder, decoder = alternate(given, *independent(given, sharing, WIDTH), 2)
    assert encoder.dtype == decoder.dtype == torch.float64
    assert encoder.shape == (4 // sharing, WIDTH, N)
    assert decoder.shape == (4, N, WIDTH)
    identity = torch.eye(WIDTH, dtype=torch.float64).expand(4 // sharing, -1, -1)
    torch.testing.assert_close(encoder @ encoder.mT, identity, atol=1e-6, rtol=1e-6)


@SHARING
def test_orthonormal_rows_change_no_score(sharing: int) -> None:
    draw = torch.Generator().manual_seed(5)
    encoder = torch.randn(4 // sharing, WIDTH, N, generator=draw, dtype=torch.float64)
    decoder = torch.randn(4, N, WIDTH, generator=draw, dtype=torch.float64)
    rows, reads = alternation._orthonormal(encoder, decoder)
    before = decoder @ encoder.repeat_interleave(sharing, dim=0)
    torch.testing.assert_close(reads @ rows.repeat_interleave(sharing, dim=0), before)


def test_a_start_that_cannot_be_bettered_stays() -> None:
    """Full width restores every score: nothing is left to regress."""
    given = sample(2)
    identity = torch.eye(N, dtype=torch.float64).expand(2, N, N)
    encoder, decoder = alternate(given, identity, identity, 3)
    torch.testing.assert_close(decoder @ encoder, identity.clone(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("turned", [False, True], ids=["axes", "turned"])
def test_dependence_of_queries_and_pulls_is_found(turned: bool) -> None:
    """A direction that queries and pulls both fill, but never at once, is worth nothing.

    Of each head's directions two are filled at once, faintly; two are filled strongly, each by
    queries or by pulls of a token, never both. As if drawn apart the strong ones look worth
    keeping. With the faint ones kept nothing at all is lost.
    """
    draw = torch.Generator().manual_seed(6)
    samples = torch.randn(2, 2, 4000, 4, generator=draw, dtype=torch.float64)
    samples[..., 2:] *= 2
    samples[0, :, 1::2, 2:] = 0
    samples[1, :, 0::2, 2:] = 0
    queries, pulls = samples.unbind(0)
    turn = torch.eye(4, dtype=torch.float64)
    if turned:
        turn = torch.linalg.qr(torch.randn(4, 4, generator=draw, dtype=torch.float64)).Q
    given = QuerySample(queries @ turn, pulls @ turn)
    known = turn[:2].expand(2, 2, 4)
    assert error(given, known, known.mT) < 1e-20
    start = independent(given, 1, 2)
    nothing = error(given, start[0], torch.zeros_like(start[1]))
    assert error(given, *start) > 0.9 * nothing
    encoder, decoder = alternate(given, *start, 10)
    assert error(given, encoder, decoder) < 1e-3 * nothing
    for rows in encoder:
        torch.testing.assert_close(rows.T @ rows, turn[:2].T @ turn[:2], atol=0.02, rtol=0)


def test_tokens_that_pull_nothing() -> None:
    given = sample(2)
    silent = QuerySample(given.queries, torch.zeros_like(given.pulls))
    start = independent(given, 1, WIDTH)
    encoder, decoder = alternate(silent, *start, 2)
    assert torch.isfinite(encoder).all()
    torch.testing.assert_close(decoder @ encoder, start[1] @ start[0], atol=1e-5, rtol=1e-5)
