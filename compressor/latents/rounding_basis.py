"""The basis in which the latents of a layer are rounded: balanced, then rotated.

:mod:`balance` says which basis loses least when every number is rounded with one step, from the
covariance C of a latent and the weight W of an error there. Both are read off solved weights, so
it does not matter how they were found: what writes a latent is E times the base's projection, what
reads it is the base's times D. Any rotation of that basis is as good in the mean; a random one
makes all numbers alike.

Pairs that RoPE turns mix by complex numbers, among the virtual heads of one frequency only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vdcompress.latents import rotary
from vdcompress.latents.balance import balance
from vdcompress.latents.keys import KeyMetric, KeyProblem, KeyWeights, part_of
from vdcompress.latents.rotation import Basis, rotates, rotation
from vdcompress.latents.values import ValueProblem, ValueWeights
from vdcompress.modeling.layout import RotaryPart


def value_basis(problem: ValueProblem, weights: ValueWeights, generator: torch.Generator) -> Basis:
    """Return the basis of each V latent.

    Args:
        problem: the layer's V path; its statistics hold the moments of V.
        weights: solved.
        generator: for the rotation.
    """
    groups = problem.groups
    encoder = _factor(weights.v_weight.unflatten(0, (groups, -1)), problem.v_weight)
    if weights.o_contract is not None:
        read = problem.o_weight @ weights.o_contract.mT
    else:
        read = weights.o_weight.unflatten(1, (len(problem.o_weight), -1)).transpose(0, 1)
    spread = encoder @ problem.values().covariance @ encoder.mT
    return _of_unit_volume(_rotated(*balance(spread, _value_reading(problem, read)), generator))


def _value_reading(problem: ValueProblem, read: Tensor) -> Tensor:
    """Return how an error of each V latent is weighed, [g, r, r].

    By the loss's gradients at the values where those were measured, else by the layer's output.

    Args:
        problem: the layer's V path.
        read: what each head's reading adds to the output, [H, hidden, r].
    """
    gradients = problem.statistics.value_gradients
    if gradients is None:
        return (read.mT @ read).unflatten(0, (problem.groups, -1)).sum(1)
    decoder = torch.linalg.pinv(problem.o_weight) @ read  # D_h, [H, d, r]
    by_head = decoder.unflatten(0, (problem.groups * problem.joined, -1)).mean(1)
    stacked = by_head.unflatten(0, (problem.groups, -1)).flatten(1, 2)  # D [g, n, r]
    return stacked.mT @ gradients.blocks(problem.groups).second @ stacked


def key_basis(
    problem: KeyProblem,
    metric: KeyMetric,
    weights: KeyWeights,
    generator: torch.Generator,
    wanted: bool | None = None,
) -> Basis:
    """Return the basis of each K latent, rotary numbers first.

    Args:
        problem: the layer's K path.
        metric: how errors of the stacked keys are weighed, and their moments.
        weights: solved.
        generator: for rotations.
        wanted: as in :func:`rotates`.
    """
    rotary_part, nope = problem.layout.k_rotary, problem.layout.k_nope
    parts = [_same(problem, rotary_part.width), _same(problem, nope.width)]
    if rotates(rotary_part, wanted):
        parts[0] = _rotary_basis(problem, metric, weights, generator)
    if rotates(nope, wanted):
        parts[1] = _nope_basis(problem, metric, weights, generator)
    return Basis(
        _side_by_side([part.turn for part in parts]), _side_by_side([part.back for part in parts])
    )


def _nope_basis(
    problem: KeyProblem, metric: KeyMetric, weights: KeyWeights, generator: torch.Generator
) -> Basis:
    """Return the basis of the numbers that RoPE does not turn, or of keys mapped behind it."""
    own = slice(problem.layout.k_rotary.width, None)
    if weights.k_compress is not None:
        kept, encoder = slice(0, None), weights.k_compress.mT
    else:
        kept = slice(problem.rotary_dim, None)
        written = weights.k_weight.unflatten(0, (problem.groups, -1))[:, own]
        stacked = problem.k_weight[:, kept].unflatten(0, (problem.groups, -1)).flatten(1, 2)
        encoder = _factor(written, stacked)
    if weights.q_expand is not None:
        decoder = weights.q_expand[:, kept, own]
    else:
        read = weights.q_weight.unflatten(0, (len(problem.q_weight), -1))[:, own]
        decoder = _factor(read, problem.q_weight[:, kept]).mT
    reading, spread = part_of(metric, problem.joined, kept)
    stacked = decoder.unflatten(0, (-1, problem.sharing)).mean(1)
    stacked = stacked.unflatten(0, (problem.groups, -1)).flatten(1, 2)  # D [g, n', r]
    turned = balance(encoder @ spread @ encoder.mT, stacked.mT @ reading @ stacked)
    return _of_unit_volume(_rotated(*turned, generator))


def _rotary_basis(
    problem: KeyProblem, metric: KeyMetric, weights: KeyWeights, generator: torch.Generator
) -> Basis:
    """Return the real form of complex maps among the virtual heads of each frequency."""
    part, groups = problem.layout.k_rotary, problem.groups
    reading, spread = rotary.complex_moments(metric, problem.rotary_dim, problem.joined)
    encoder, decoder = _complex_maps(problem, weights)  # [g, P, m], [g, m, P]
    size = len(part.frequencies)
    turn = torch.zeros(groups, size, size, dtype=torch.complex128, device=encoder.device)
    back = torch.zeros_like(turn)
    for frequency in sorted(set(part.frequencies)):
        rows = _places(part, frequency).to(encoder.device)
        e, d = encoder[:, rows], decoder[:, :, rows]
        found = balance(e @ spread[:, frequency] @ e.mH, d.mH @ reading[:, frequency] @ d)
        one = _rotated(*found, generator)
        turn[:, rows[:, None], rows], back[:, rows[:, None], rows] = one.turn, one.back
    return _of_unit_volume(Basis(_real(turn), _real(back)))


def _complex_maps(problem: KeyProblem, weights: KeyWeights) -> tuple[Tensor, Tensor]:
    """Return E [g, P, m] and D [g, m, P] of the rotary pairs, from the solved weights."""
    part, heads = problem.layout.k_rotary, len(problem.q_weight)
    pairs, rotated = len(part.frequencies), problem.rotary_dim
    written = weights.k_weight.unflatten(0, (problem.groups, -1))[:, : 2 * pairs]
    base = rotary.complex_rows(problem.k_weight, part.frequencies, rotated)
    base = base.unflatten(0, (problem.groups, -1)).transpose(1, 2)  # [g, P, m, hidden]
    rows = torch.complex(written[:, :pairs], written[:, pairs:])
    encoder = _factor(rows.unsqueeze(2), base).squeeze(2)
    if weights.q_expand is not None:
        own = torch.eye(problem.q_weight.shape[1]).to(problem.q_weight)
        queries, read = own.expand(heads, -1, -1), weights.q_expand.mT[:, : 2 * pairs]
    else:
        queries = problem.q_weight
        read = weights.q_weight.unflatten(0, (heads, -1))[:, : 2 * pairs]
    asked = rotary.complex_rows(queries, part.frequencies, rotated)
    answered = torch.complex(read[:, :pairs], read[:, pairs:])
    conjugate = (answered * asked.conj()).sum(-1) / asked.abs().square().sum(-1)
    by_kv_head = conjugate.conj().unflatten(0, (-1, problem.sharing)).mean(1)
    return encoder, by_kv_head.unflatten(0, (problem.groups, -1))


def _places(part: RotaryPart, frequency: int) -> Tensor:
    """Return which pairs are of a frequency."""
    return torch.tensor([p for p, index in enumerate(part.frequencies) if index == frequency])


def _rotated(turn: Tensor, back: Tensor, generator: torch.Generator) -> Basis:
    mix = rotation(turn.shape[-1], generator).to(turn)
    return Basis(mix @ turn, back @ mix.mT)


def _of_unit_volume(basis: Basis) -> Basis:
    """Return a basis scaled as a whole, so that weights in it are about as large as they were.

    Quantisers do not mind: their steps follow the numbers. The steps of an optimiser do not.
    """
    volume = torch.linalg.slogdet(basis.turn).logabsdet / basis.turn.shape[-1]
    scale = volume.exp()[..., None, None]
    return Basis(basis.turn / scale, basis.back * scale)


def _same(problem: KeyProblem, width: int) -> Basis:
    identity = torch.eye(width).to(problem.k_weight).expand(problem.groups, width, width)
    return Basis(identity, identity)


def _factor(product: Tensor, right: Tensor) -> Tensor:
    """Return X [..., r, n] with X R = P, for P [..., r, x] and R [..., n, x] of full row rank."""
    return product @ torch.linalg.pinv(right)


def _real(x: Tensor) -> Tensor:
    """Return what a complex map [..., p, p] does to real and imaginary parts, [..., 2 p, 2 p]."""
    upper, lower = torch.cat((x.real, -x.imag), -1), torch.cat((x.imag, x.real), -1)
    return torch.cat((upper, lower), -2)


def _side_by_side(parts: list[Tensor]) -> Tensor:
    """Put square matrices [g, n, n] on one diagonal."""
    rows = zip(*parts, strict=True)
    return torch.stack([torch.block_diag(*blocks) for blocks in rows])
