"""Repair from moments: joint refit of the output projection, and alternation (DESIGN 3.2).

It needs the joint moments of what the latents are averaged to, which calibration has where every
key/value head keeps a latent of its own and K is as it was; everything else is repaired by
:mod:`vdcompress.repair`, which runs the compressed attention.

All heads' latents z = E (o - center) together predict the base layer's output y = W_o o + b_o on
the same input, so the best W_o' and b_o' are a linear regression whose moments follow from those
of o. The ridge pulls towards W_o D, not towards zero, so that full width stays exact.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vdcompress.latents.lowrank import best_encoder, diagonal_blocks, regression_decoder
from vdcompress.latents.values import (
    Latents,
    ValueProblem,
    ValueWeights,
    encode,
    per_head,
)

RIDGE = 1e-6


@dataclass(frozen=True)
class Reading:
    """Encoders and the output projection that reads them.

    Attributes:
        encoder: E, [G, r, d].
        o_weight: [hidden, H r].
        error: E|y - y'|^2 over the calibration tokens, what refit and alternation make small.
    """

    encoder: Tensor
    o_weight: Tensor
    error: float


def refit(problem: ValueProblem, latents: Latents, rounds: int = 0) -> ValueWeights:
    """Refit the output projection to all latents at once, after ``rounds`` of alternation.

    A round updates one group's encoder after the other against the residual that the other groups
    leave, then refits jointly. The reading with the smallest error on the calibration's moments is
    kept, so a round never makes it worse.
    """
    prior = (problem.o_weight @ latents.decoder).transpose(0, 1).flatten(1)
    best = current = _regress(problem, latents.encoder, prior)
    if latents.encoder.shape[-2] < latents.encoder.shape[-1]:
        for _ in range(rounds):
            current = _regress(problem, *_alternate(problem, current))
            best = min(best, current, key=lambda reading: reading.error)
    return _weights(problem, replace(latents, encoder=best.encoder), best.o_weight)


def _weights(problem: ValueProblem, latents: Latents, o_weight: Tensor) -> ValueWeights:
    """Return weights whose output has the base's mean."""
    mean = problem.outputs().mean
    centers = per_head(latents.center, problem.sharing).flatten()
    latent_mean = _joint(latents.encoder, problem.sharing) @ (mean - centers)
    y_mean = problem.o_bias + _joint_output(problem) @ mean
    return ValueWeights(
        *encode(problem, latents), o_weight=o_weight, o_bias=y_mean - o_weight @ latent_mean
    )


def _regress(problem: ValueProblem, encoder: Tensor, prior: Tensor) -> Reading:
    """Read encoders [g, r, d] by the regression of y on all latents."""
    covariance, w_o = problem.outputs().covariance, _joint_output(problem)
    joint = _joint(encoder, problem.sharing)
    cross = covariance @ joint.mT
    within = joint @ cross
    o_weight = regress(within, w_o @ cross, prior)
    left = w_o - o_weight @ joint
    return Reading(encoder, o_weight, float(((left @ covariance) * left).sum()))


def regress(within: Tensor, cross: Tensor, prior: Tensor) -> Tensor:
    """Return W = (Cov[y, z] + ridge W_0) (Cov[z] + ridge I)^(-1).

    Args:
        within: Cov[z], [n, n].
        cross: Cov[y, z], [hidden, n].
        prior: W_0, [hidden, n], where the ridge pulls to.
    """
    ridge = RIDGE * within.diagonal().mean()
    damped = within + ridge * torch.eye(len(within), dtype=within.dtype, device=within.device)
    weight: Tensor = torch.linalg.solve(damped, (cross + ridge * prior).mT).mT
    return weight


def _alternate(problem: ValueProblem, start: Reading) -> tuple[Tensor, Tensor]:
    """Update every group's encoder once; return encoders [G, r, d] and o_weight [hidden, H r].

    With the residual R = y - (what other heads already explain), each head's best full-width map
    is Cov[R, o_h] S_h^(-1); the group's encoder is the optimum of 3.1 for these maps.
    """
    covariance = problem.outputs().covariance
    heads, _hidden, d = problem.o_weight.shape
    within = diagonal_blocks(covariance, heads)
    encoder = start.encoder.clone()
    reads = start.o_weight.unflatten(1, (heads, -1)).permute(1, 0, 2).clone()
    columns = covariance.unflatten(1, (heads, d)).permute(1, 0, 2)
    left = _joint_output(problem) - start.o_weight @ _joint(encoder, problem.sharing)
    for group in range(len(encoder)):
        mine = range(group * problem.sharing, (group + 1) * problem.sharing)
        maps = []
        for head in mine:
            place = slice(head * d, (head + 1) * d)
            own = left.clone()
            own[:, place] += reads[head] @ encoder[group]
            maps.append(own @ columns[head] @ torch.linalg.pinv(within[head], hermitian=True))
        for head in mine:
            left[:, head * d : (head + 1) * d] += reads[head] @ encoder[group]
        gram = torch.stack([m.mT @ m for m in maps]).sum(0)
        spread = within[mine.start : mine.stop]
        encoder[group] = best_encoder(gram, spread.mean(0), encoder.shape[1])
        for head, full in zip(mine, maps, strict=True):
            reads[head] = full @ regression_decoder(encoder[group], within[head])
            left[:, head * d : (head + 1) * d] -= reads[head] @ encoder[group]
    return encoder, reads.transpose(0, 1).flatten(1)


def _joint(encoder: Tensor, sharing: int) -> Tensor:
    """Return the block-diagonal encoder of all heads [H r, H d]."""
    joint: Tensor = torch.block_diag(*per_head(encoder, sharing))
    return joint


def _joint_output(problem: ValueProblem) -> Tensor:
    """Return W_o [hidden, H d]."""
    return problem.o_weight.transpose(0, 1).flatten(1)
