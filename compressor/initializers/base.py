"""The contract of an initialiser, and how its answer is folded into weights.

Letters: H query heads, G key/value heads, d head width, r latent width. All float64. Head h reads
the latent of group ``h // (H / G)``. With o_h the attention output of head h, an initialiser finds

    o_h  ~  offset_h + D_h E_g (o_h - center_g)

and because the rows of a softmax sum to 1 the constants fold into biases exactly (DESIGN 3.1).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vdcompress.errors import UsageError
from vdcompress.statistics import LayerStatistics, Moments

SINGULAR = 1e-10


@dataclass(frozen=True)
class ValueProblem:
    """The V path of one layer.

    Attributes:
        v_weight: [G, d, hidden].
        v_bias: [G, d], zeros where the base has none.
        o_weight: [H, hidden, d], each head's block of the output projection.
        o_bias: [hidden].
        width: r.
        statistics: the layer's moments.
        generator: for random numbers.
    """

    v_weight: Tensor
    v_bias: Tensor
    o_weight: Tensor
    o_bias: Tensor
    width: int
    statistics: LayerStatistics
    generator: torch.Generator

    @property
    def sharing(self) -> int:
        """Query heads per latent."""
        return self.o_weight.shape[0] // self.v_weight.shape[0]

    def values(self) -> Moments:
        """Return the moments of V per key/value head."""
        return _measured(self.statistics.values, "values")

    def outputs(self) -> Moments:
        """Return the joint moments of the attention output: mean [H d], covariance [H d, H d]."""
        return _measured(self.statistics.outputs, "outputs")


@dataclass(frozen=True)
class Latents:
    """An initialiser's answer.

    Attributes:
        encoder: E, [G, r, d], orthonormal rows.
        decoder: D, [H, d, r].
        center: [G, d].
        offset: [H, d].
    """

    encoder: Tensor
    decoder: Tensor
    center: Tensor
    offset: Tensor


@dataclass(frozen=True)
class ValueWeights:
    """The new weights of a layer's V path.

    Attributes:
        v_weight: [G r, hidden].
        v_bias: [G r].
        o_weight: [hidden, H r].
        o_bias: [hidden].
    """

    v_weight: Tensor
    v_bias: Tensor
    o_weight: Tensor
    o_bias: Tensor


@dataclass(frozen=True)
class Initializer:
    """A named way to find latents.

    Attributes:
        solve: maps a problem to latents; at full width they restore every value exactly.
        needs: which moments it reads, of ``values`` and ``outputs``.
        default_refit: ``none`` or ``local`` when the user names neither.
        default_alternate: rounds of alternation when the user names no number.
    """

    solve: Callable[[ValueProblem], Latents]
    needs: frozenset[str]
    default_refit: str = "none"
    default_alternate: int = 0


def fold(problem: ValueProblem, latents: Latents) -> ValueWeights:
    """Fold latents into the projections; exact but for what the latents leave out."""
    o_weight = problem.o_weight @ latents.decoder
    return ValueWeights(
        *encode(problem, latents),
        o_weight=o_weight.transpose(0, 1).flatten(1),
        o_bias=problem.o_bias + torch.einsum("hyd,hd->y", problem.o_weight, latents.offset),
    )


def encode(problem: ValueProblem, latents: Latents) -> tuple[Tensor, Tensor]:
    """Return weight [G r, hidden] and bias [G r] of the projection that writes the latents."""
    weight = latents.encoder @ problem.v_weight
    bias = torch.einsum("grd,gd->gr", latents.encoder, problem.v_bias - latents.center)
    return weight.flatten(0, 1), bias.flatten()


def orthogonal(problem: ValueProblem, encoder: Tensor, center: Tensor) -> Latents:
    """Latents that are decoded by the transpose of the encoder.

    Args:
        problem: the layer's V path.
        encoder: [G, r, d], orthonormal rows.
        center: [G, d].
    """
    return Latents(
        encoder=encoder,
        decoder=per_head(encoder, problem.sharing).mT,
        center=center,
        offset=per_head(center, problem.sharing),
    )


def keep_everything(problem: ValueProblem) -> Latents:
    """Latents of full width: E = I and nothing folded, so every weight stays what it was."""
    groups, d, _hidden = problem.v_weight.shape
    identity = torch.eye(d, dtype=torch.float64, device=problem.v_weight.device)
    nothing = torch.zeros_like(problem.v_bias)
    return orthogonal(problem, identity.expand(groups, d, d), nothing)


def per_head(x: Tensor, sharing: int) -> Tensor:
    """Repeat what belongs to a group [G, ...] for each of its query heads [H, ...]."""
    return x.repeat_interleave(sharing, dim=0)


def leading_eigenvectors(symmetric: Tensor, width: int) -> Tensor:
    """Return the ``width`` leading eigenvectors as rows [..., width, n] of [..., n, n]."""
    vectors: Tensor = torch.linalg.eigh(symmetric).eigenvectors
    return vectors.flip(-1)[..., :width].mT


def square_roots(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Return C^(1/2) and its pseudo-inverse, [..., n, n].

    Eigenvalues below 1e-10 of the largest count as zero.
    """
    values, vectors = torch.linalg.eigh(covariance)
    kept = values > SINGULAR * values[..., -1:].clamp_min(torch.finfo(values.dtype).tiny)
    roots = values.clamp_min(0).sqrt() * kept
    inverse = torch.where(kept, 1 / roots.clamp_min(torch.finfo(values.dtype).tiny), 0.0)
    return (vectors * roots.unsqueeze(-2)) @ vectors.mT, (
        vectors * inverse.unsqueeze(-2)
    ) @ vectors.mT


def _measured(moments: Moments | None, name: str) -> Moments:
    if moments is None:
        raise UsageError(f"the statistics hold no {name}", f"calibrate(..., needs={{{name!r}}})")
    return moments
