"""Rotate latents that are stored in few bits, so that all their numbers are of one size.

A block of numbers shares a scale: a large one makes the others coarse. An orthogonal R in front of
the cache and R^T behind it spreads every direction over all numbers and changes nothing else. Both
fold: R into what writes the latents, R^T into what reads them. Pairs that RoPE turns may be mixed
among the virtual heads of one frequency only, by unitary numbers; whole keys are rotated behind it.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from vdcompress.latents.keys import KeyWeights
from vdcompress.latents.values import ValueWeights
from vdcompress.modeling.layout import LayerLayout, Part, RotaryPart
from vdcompress.modeling.schemes import SCHEMES


def rotation(size: int, generator: torch.Generator | None = None) -> Tensor:
    """Return a random orthogonal matrix [size, size], float64.

    It is a Hadamard matrix of the largest power of two in ``size``, times a random orthogonal one
    of what is left (Kronecker), with random signs: every entry is about equally large, and every
    number is mixed with every other.
    """
    power = size & -size
    left = torch.randn(size // power, size // power, dtype=torch.float64, generator=generator)
    rest, triangle = torch.linalg.qr(left)
    rest = rest * triangle.diagonal().sgn()
    signs = torch.randint(0, 2, (size,), generator=generator).double() * 2 - 1
    return torch.kron(hadamard(power), rest.contiguous()) * signs


def hadamard(size: int) -> Tensor:
    """Return the orthogonal Hadamard matrix of a power of two (Sylvester), float64."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    step = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64) / 2**0.5
    while len(matrix) < size:
        matrix = torch.kron(step, matrix)
    return matrix


def rotates(part: Part, wanted: bool | None = None) -> bool:
    """Say whether a part is rotated.

    Args:
        part: its layout.
        wanted: None rotates a packed part if numbers of one token share a scale.
    """
    if not part.packed or wanted is not None:
        return part.packed and bool(wanted)
    return SCHEMES[part.quantizer or ""].token_block == 1


def rotate_values(weights: ValueWeights, part: Part, generator: torch.Generator) -> ValueWeights:
    """Fold a rotation of each V latent into its path.

    Args:
        weights: solved.
        part: V's layout.
        generator: for random numbers.
    """
    turn = rotation(part.width, generator).to(weights.v_weight)
    turned = replace(
        weights,
        v_weight=(turn @ weights.v_weight.unflatten(0, (part.groups, -1))).flatten(0, 1),
        v_bias=(weights.v_bias.unflatten(0, (part.groups, -1)) @ turn.mT).flatten(),
    )
    if weights.o_contract is not None:
        return replace(turned, o_contract=turn @ weights.o_contract)
    by_head = weights.o_weight.unflatten(1, (-1, part.width))
    return replace(turned, o_weight=(by_head @ turn.mT).flatten(1))


def rotate_keys(
    weights: KeyWeights,
    layout: LayerLayout,
    generator: torch.Generator,
    wanted: bool | None = None,
) -> KeyWeights:
    """Fold rotations of the parts of each K latent into its path.

    Args:
        weights: solved.
        layout: of the layer.
        generator: for random numbers.
        wanted: as in :func:`rotates`.
    """
    turn = key_rotation(layout, generator, wanted).to(weights.k_weight)
    groups, width = layout.k_groups, layout.k_head_dim
    if weights.k_compress is not None and weights.k_shift is not None:
        written = replace(
            weights, k_compress=weights.k_compress @ turn.mT, k_shift=weights.k_shift @ turn.mT
        )
    else:
        written = replace(
            weights,
            k_weight=(turn @ weights.k_weight.unflatten(0, (groups, -1))).flatten(0, 1),
            k_bias=(weights.k_bias.unflatten(0, (groups, -1)) @ turn.mT).flatten(),
        )
    if weights.q_expand is not None:
        return replace(written, q_expand=weights.q_expand @ turn.mT)
    return replace(
        written,
        q_weight=(turn @ weights.q_weight.unflatten(0, (-1, width))).flatten(0, 1),
        q_bias=(weights.q_bias.unflatten(0, (-1, width)) @ turn.mT).flatten(),
    )


def key_rotation(
    layout: LayerLayout, generator: torch.Generator, wanted: bool | None = None
) -> Tensor:
    """Return the orthogonal map [k, k] of a whole K latent, rotary numbers first, float64."""
    rotary, nope = layout.k_rotary, layout.k_nope
    turned = rotary_rotation(rotary, generator) if rotates(rotary, wanted) else _identity(rotary)
    still = rotation(nope.width, generator) if rotates(nope, wanted) else _identity(nope)
    return torch.block_diag(turned, still)


def _identity(part: Part) -> Tensor:
    return torch.eye(part.width, dtype=torch.float64)


def rotary_rotation(part: RotaryPart, generator: torch.Generator) -> Tensor:
    """Return the map [w, w] that mixes both members of all pairs of a frequency alike."""
    pairs = len(part.frequencies)
    mix = torch.zeros(pairs, pairs, dtype=torch.float64)
    for frequency in sorted(set(part.frequencies)):
        places = [place for place, index in enumerate(part.frequencies) if index == frequency]
        rows = torch.tensor(places)
        mix[rows.unsqueeze(1), rows] = rotation(len(places), generator)
    return torch.block_diag(mix, mix)
