"""The V path of one layer: what an initialiser gets, what it answers, how the answer is folded.

Letters: H query heads, G key/value heads, d head width; g latents, each of r numbers, shared by
G/g key/value heads whose values stand side by side, n = d G/g numbers. All float64. Head h reads
latent ``h // (H / g)``. With v the stacked values of a latent's heads, an initialiser finds for
the rows v_h that head h attends to

    v_h  ~  offset_h + D_h E (v - center)

and because the rows of a softmax sum to 1 the constants fold into biases exactly (DESIGN 3.1, 3.4).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vdcompress.latents.lowrank import diagonal_blocks
from vdcompress.statistics import LayerStatistics, Moments


@dataclass(frozen=True)
class ValueProblem:
    """The V path of one layer.

    Attributes:
        v_weight: [g, n, hidden].
        v_bias: [g, n], zeros where the base has none.
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
    def groups(self) -> int:
        """Return g."""
        return self.v_weight.shape[0]

    @property
    def sharing(self) -> int:
        """Query heads per latent."""
        return self.o_weight.shape[0] // self.groups

    @property
    def joined(self) -> int:
        """Key/value heads per latent."""
        return self.v_weight.shape[1] // self.o_weight.shape[-1]

    def values(self) -> Moments:
        """Return the moments of each latent's stacked values: mean [g, n], covariance [g, n, n]."""
        return self.statistics.require("values").blocks(self.groups)

    def outputs(self) -> Moments:
        """Return the joint moments of the attention output: mean [H d], covariance [H d, H d]."""
        return self.statistics.require("outputs")

    def head_rows(self, stacked: Tensor) -> Tensor:
        """Return each query head's rows [H, d, ...] of what has stacked rows [g, n, ...]."""
        kv_heads = stacked.unflatten(1, (self.joined, -1)).flatten(0, 1)
        return per_head(kv_heads, self.sharing // self.joined)


@dataclass(frozen=True)
class Latents:
    """An initialiser's answer.

    Attributes:
        encoder: E, [g, r, n], orthonormal rows.
        decoder: D, [H, d, r].
        center: [g, n].
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
        v_weight: [g r, hidden].
        v_bias: [g r].
        o_weight: [hidden, H r], or [hidden, H d] behind ``o_contract``.
        o_bias: [hidden].
        o_contract: [H, r, d], each head's map from its latent; None where it is folded.
    """

    v_weight: Tensor
    v_bias: Tensor
    o_weight: Tensor
    o_bias: Tensor
    o_contract: Tensor | None = None


def fold(problem: ValueProblem, latents: Latents) -> ValueWeights:
    """Fold latents into the projections; exact but for what the latents leave out."""
    o_weight = problem.o_weight @ latents.decoder
    return ValueWeights(
        *encode(problem, latents),
        o_weight=o_weight.transpose(0, 1).flatten(1),
        o_bias=problem.o_bias + torch.einsum("hyd,hd->y", problem.o_weight, latents.offset),
    )


def map_per_head(problem: ValueProblem, latents: Latents) -> ValueWeights:
    """Leave the output projection as it is and put each head's decoder before it."""
    return replace(
        fold(problem, latents),
        o_weight=problem.o_weight.transpose(0, 1).flatten(1),
        o_contract=latents.decoder.mT,
    )


def encode(problem: ValueProblem, latents: Latents) -> tuple[Tensor, Tensor]:
    """Return weight [g r, hidden] and bias [g r] of the projection that writes the latents."""
    weight = latents.encoder @ problem.v_weight
    bias = torch.einsum("grn,gn->gr", latents.encoder, problem.v_bias - latents.center)
    return weight.flatten(0, 1), bias.flatten()


def orthogonal(problem: ValueProblem, encoder: Tensor, center: Tensor) -> Latents:
    """Latents that are decoded by the transpose of the encoder.

    Args:
        problem: the layer's V path.
        encoder: [g, r, n], orthonormal rows.
        center: [g, n].
    """
    return decoded(problem, encoder, encoder.mT, center)


def decoded(problem: ValueProblem, encoder: Tensor, decoder: Tensor, center: Tensor) -> Latents:
    """Latents of whole groups: their heads read them through the rows of one decoder [g, n, r]."""
    return Latents(
        encoder=encoder,
        decoder=problem.head_rows(decoder),
        center=center,
        offset=problem.head_rows(center),
    )


def keep_everything(problem: ValueProblem) -> Latents:
    """Latents of full width: E = I and nothing folded, so every weight stays what it was."""
    return _everything(problem, torch.zeros_like(problem.v_bias))


def keep_centred(problem: ValueProblem) -> Latents:
    """Latents of full width without their mean, which few bits would have to carry."""
    return _everything(problem, problem.values().mean.to(problem.v_bias))


def _everything(problem: ValueProblem, center: Tensor) -> Latents:
    groups, n, _hidden = problem.v_weight.shape
    identity = torch.eye(n, dtype=torch.float64, device=problem.v_weight.device)
    return orthogonal(problem, identity.expand(groups, n, n), center)


def per_head(x: Tensor, sharing: int) -> Tensor:
    """Repeat what belongs to a group [g, ...] for each of its query heads [H, ...]."""
    return x.repeat_interleave(sharing, dim=0)


def group_average(x: Tensor, sharing: int) -> Tensor:
    """[H, ...] -> [g, ...], the mean over each group's query heads."""
    average: Tensor = x.unflatten(0, (-1, sharing)).mean(1)
    return average


def head_outputs(problem: ValueProblem) -> Moments:
    """Return the moments of each head's own attention output: mean [H, d], covariance [H, d, d]."""
    outputs, heads = problem.outputs(), problem.o_weight.shape[0]
    return Moments(
        outputs.mean.view(heads, -1), diagonal_blocks(outputs.covariance, heads), outputs.count
    )
