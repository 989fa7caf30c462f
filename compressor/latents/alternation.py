"""Alternating least squares between the latents of keys and the queries that read them.

For one token's query q the loss moves by q^T (k - k') weighed over all keys: with the pull
m = dLoss/dq, which is the sum over keys of dLoss/dscore times the key, that is m^T (I - E^T D^T) q.
Its square over tokens is the second-order loss. The optimum of :mod:`vdcompress.latents.lowrank`
takes E[m m^T] and E[q q^T] as independent, which they are not: a query that looks far has other
pulls than one that looks near. Here the joint distribution is kept, from a sample of tokens: with E
fixed the best D_h is a linear regression, with D_h fixed the best E is another.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vdcompress.statistics import QuerySample

RIDGE = 1e-2
STEPS = 15
TOLERANCE = 1e-5


def alternate(
    sample: QuerySample, encoder: Tensor, decoder: Tensor, rounds: int
) -> tuple[Tensor, Tensor]:
    """Improve latents of keys, one for each key/value head.

    Args:
        sample: queries and pulls [H, tokens, n].
        encoder: E [G, r, n] to start from.
        decoder: D_h [H, n, r] to start from.
        rounds: how often both sides are fitted.

    Returns:
        E [G, r, n] with orthonormal rows and D_h [H, n, r]: those with the smallest error on the
        sample, which may be the first.
    """
    queries, pulls = sample.queries.float(), sample.pulls.float()
    exact, sharing = encoder.dtype, len(queries) // len(encoder)
    encoder, decoder = encoder.float(), decoder.float()
    wanted = (queries * pulls).sum(-1)
    best = encoder, decoder
    least = _error(queries, pulls, wanted, encoder, decoder)
    for _ in range(rounds):
        latent = pulls @ encoder.repeat_interleave(sharing, dim=0).mT
        decoder = _regress(queries, latent, wanted, decoder, 1)
        latent = queries @ decoder
        encoder = _regress(pulls, latent, wanted, encoder.mT, sharing).mT
        error = _error(queries, pulls, wanted, encoder, decoder)
        least, best = min((least, best), (error, (encoder, decoder)), key=lambda found: found[0])
    return _orthonormal(*(found.to(exact) for found in best))


def _error(q: Tensor, m: Tensor, wanted: Tensor, encoder: Tensor, decoder: Tensor) -> float:
    """Sum over heads and tokens of (m^T (I - E^T D^T) q)^2, in float64."""
    rows = encoder.repeat_interleave(len(q) // len(encoder), dim=0)
    found = ((m @ rows.mT) * (q @ decoder)).sum(-1)
    return float((wanted - found).double().square().sum())


def _regress(x: Tensor, z: Tensor, wanted: Tensor, prior: Tensor, sharing: int) -> Tensor:
    """Fit wanted ~ x^T X z by conjugate gradients, with a ridge towards the prior.

    Args:
        x: [H, tokens, n].
        z: [H, tokens, r].
        wanted: [H, tokens].
        prior: X to start from, [H / sharing, n, r].
        sharing: how many heads have one X together.
    """

    def gather(weights: Tensor) -> Tensor:
        """Sum over tokens, and over the heads that share, of w x z^T."""
        return (x.mT @ (weights.unsqueeze(-1) * z)).unflatten(0, (-1, sharing)).sum(1)

    def read(matrix: Tensor) -> Tensor:
        return ((x @ matrix.repeat_interleave(sharing, dim=0)) * z).sum(-1)

    scale = (x.square().mT @ z.square()).unflatten(0, (-1, sharing)).sum(1)
    ridge = RIDGE * scale.mean((-2, -1), keepdim=True)
    residual = gather(wanted - read(prior))
    step, found = torch.zeros_like(prior), residual / (scale + ridge)
    direction, power = found, _dot(residual, found)
    first = power
    for _ in range(STEPS):
        if bool((power <= TOLERANCE**2 * first).all()):
            break
        image = gather(read(direction)) + ridge * direction
        length = power / _dot(direction, image).clamp_min(torch.finfo(power.dtype).tiny)
        step, residual = step + length * direction, residual - length * image
        found = residual / (scale + ridge)
        before, power = power, _dot(residual, found)
        direction = found + power / before.clamp_min(torch.finfo(power.dtype).tiny) * direction
    return prior + step


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product of matrices [..., n, r], kept as [..., 1, 1]."""
    return (a * b).sum((-2, -1), keepdim=True)


def _orthonormal(encoder: Tensor, decoder: Tensor) -> tuple[Tensor, Tensor]:
    """Make E's rows orthonormal and leave E^T D^T as it is."""
    basis, triangle = torch.linalg.qr(encoder.mT)
    sharing = len(decoder) // len(encoder)
    return basis.mT, decoder @ triangle.mT.repeat_interleave(sharing, dim=0)
