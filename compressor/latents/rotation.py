"""Turn latents that are stored in few bits into another basis, exactly.

A block of numbers shares a scale: a large one makes the others coarse. A rotation spreads every
direction over all numbers. Any invertible T in front of the cache with T^(-1) behind it changes
nothing else, and both fold into what writes and what reads the latents.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vdcompress.latents.keys import KeyWeights
from vdcompress.latents.values import ValueWeights
from vdcompress.modeling.layout import LayerLayout, Part
from vdcompress.modeling.schemes import SCHEMES


@dataclass(frozen=True)
class Basis:
    """A change of basis of every latent of one side.

    Attributes:
        turn: T, [g, r, r]; the cache holds T z.
        back: T^(-1), [g, r, r].
    """

    turn: Tensor
    back: Tensor


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
    """Say whether a part is turned and rotated.

    Args:
        part: its layout.
        wanted: None does so to a packed part if numbers of one token share a scale.
    """
    if not part.packed or wanted is not None:
        return part.packed and bool(wanted)
    return SCHEMES[part.quantizer or ""].token_block == 1


def turn_values(weights: ValueWeights, part: Part, basis: Basis) -> ValueWeights:
    """Fold a change of basis of each V latent into its path.

    Args:
        weights: solved.
        part: V's layout.
        basis: of its latents.
    """
    v_bias = weights.v_bias.unflatten(0, (part.groups, -1)).unsqueeze(-1)
    turned = replace(
        weights,
        v_weight=(basis.turn @ weights.v_weight.unflatten(0, (part.groups, -1))).flatten(0, 1),
        v_bias=(basis.turn @ v_bias).flatten(),
    )
    if weights.o_contract is not None:
        back = of_heads(basis.back, len(weights.o_contract))
        return replace(turned, o_contract=back.mT @ weights.o_contract)
    by_head = weights.o_weight.unflatten(1, (-1, part.width)).transpose(0, 1)
    read = by_head @ of_heads(basis.back, len(by_head))
    return replace(turned, o_weight=read.transpose(0, 1).flatten(1))


def turn_keys(weights: KeyWeights, layout: LayerLayout, basis: Basis) -> KeyWeights:
    """Fold a change of basis of each K latent into its path.

    Args:
        weights: solved.
        layout: of the layer.
        basis: of its K latents, rotary numbers first.
    """
    groups, width, turn = layout.k_groups, layout.k_head_dim, basis.turn
    if weights.k_compress is not None and weights.k_shift is not None:
        written = replace(
            weights, k_compress=weights.k_compress @ turn.mT, k_shift=weights.k_shift @ turn.mT
        )
    else:
        k_bias = weights.k_bias.unflatten(0, (groups, -1)).unsqueeze(-1)
        written = replace(
            weights,
            k_weight=(turn @ weights.k_weight.unflatten(0, (groups, -1))).flatten(0, 1),
            k_bias=(turn @ k_bias).flatten(),
        )
    if weights.q_expand is not None:
        back = of_heads(basis.back, len(weights.q_expand))
        return replace(written, q_expand=weights.q_expand @ back)
    by_head = weights.q_weight.unflatten(0, (-1, width))
    q_bias = weights.q_bias.unflatten(0, (-1, width)).unsqueeze(-1)
    back = of_heads(basis.back, len(by_head))
    return replace(
        written,
        q_weight=(back.mT @ by_head).flatten(0, 1),
        q_bias=(back.mT @ q_bias).flatten(),
    )


def of_heads(x: Tensor, heads: int) -> Tensor:
    """[g, ...] -> [H, ...]: what belongs to each head's latent."""
    return x.repeat_interleave(heads // len(x), dim=0)
