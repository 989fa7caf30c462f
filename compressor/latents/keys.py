"""The K path of one layer: latents of keys and the queries that read them.

Letters as in :mod:`vdcompress.latents.values`; P kept rotary pairs per latent. A query meets a
key in q^T k only, so with k ~ mu + D E (k - mu) the query becomes D_h^T q: the constant q^T mu is
the same for every key and the softmax does not see it. Nothing is rebuilt at run time.

Families that rotate a part of each head get folded projections: the unrotated dimensions are mixed
freely, the rotated ones within each frequency (:mod:`vdcompress.latents.rotary`). Families that
rotate whole heads get small matrices behind RoPE, one for each new key, one for each query.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vdcompress.latents import alternation, rotary
from vdcompress.latents.lowrank import best_encoder, regression_decoder
from vdcompress.modeling.layout import LayerLayout
from vdcompress.statistics import LayerStatistics, Moments, QuerySample


@dataclass(frozen=True)
class KeyProblem:
    """The K path of one layer.

    Attributes:
        q_weight: [H, d, hidden].
        q_bias: [H, d], zeros where the base has none.
        k_weight: [G, d, hidden].
        k_bias: [G, d], zeros where the base has none.
        rotary_dim: how many dimensions of a head RoPE rotates, the first ones.
        layout: what the cache keeps.
        statistics: the layer's moments.
        generator: for random numbers.
    """

    q_weight: Tensor
    q_bias: Tensor
    k_weight: Tensor
    k_bias: Tensor
    rotary_dim: int
    layout: LayerLayout
    statistics: LayerStatistics
    generator: torch.Generator

    @property
    def groups(self) -> int:
        """Return g."""
        return self.layout.k_groups

    @property
    def joined(self) -> int:
        """Key/value heads per latent."""
        return self.k_weight.shape[0] // self.groups

    @property
    def sharing(self) -> int:
        """Query heads per key/value head."""
        return self.q_weight.shape[0] // self.k_weight.shape[0]

    def keys(self) -> Moments:
        """Return the moments of each latent's stacked keys: mean [g, n], covariance [g, n, n]."""
        return self.statistics.require("keys").blocks(self.groups)


@dataclass(frozen=True)
class KeyMetric:
    """What an initialiser answers for K: how an error of the stacked keys is weighed.

    Attributes:
        reading: M, [g, n, n].
        keys: moments of the stacked keys as the initialiser sees them: mean [g, n], which is taken
            away before they are compressed, and covariance [g, n, n].
    """

    reading: Tensor
    keys: Moments


@dataclass(frozen=True)
class KeyWeights:
    """The new weights of a layer's K path; None where the layout has no such matrix.

    Attributes:
        q_weight: [H w, hidden], w the width of a latent where maps are folded, else d.
        q_bias: [H w].
        k_weight: [g w, hidden], or the base's [G d, hidden].
        k_bias: likewise.
        q_expand: [H, d, r], applied to queries; behind RoPE where keys are compressed there.
        k_compress: [g, n, r], applied to keys behind RoPE.
        k_shift: [g, 1, r], added to what it writes.
    """

    q_weight: Tensor
    q_bias: Tensor
    k_weight: Tensor
    k_bias: Tensor
    q_expand: Tensor | None = None
    k_compress: Tensor | None = None
    k_shift: Tensor | None = None


def solve_keys(problem: KeyProblem, metric: KeyMetric, rounds: int = 0) -> KeyWeights:
    """Find the latents that a layout asks for and fold them into the projections.

    Args:
        problem: the layer's K path.
        metric: of the whole stacked keys.
        rounds: of alternation with the query side, where there is a sample of queries and every
            key/value head has a latent of its own.
    """
    solve = _behind_rope if problem.layout.k_nope.after_rope else _folded
    return solve(problem, metric, rounds)


def _behind_rope(problem: KeyProblem, metric: KeyMetric, rounds: int) -> KeyWeights:
    """Compress whole keys after RoPE has turned them."""
    width = problem.layout.k_head_dim
    encoder, decoder = _latents(problem, metric, rounds, slice(0, None), width)
    shift = -(encoder @ metric.keys.mean.unsqueeze(-1)).mT
    return KeyWeights(
        q_weight=problem.q_weight.flatten(0, 1),
        q_bias=problem.q_bias.flatten(),
        k_weight=problem.k_weight.flatten(0, 1),
        k_bias=problem.k_bias.flatten(),
        q_expand=decoder,
        k_compress=encoder.mT,
        k_shift=shift,
    )


def _folded(problem: KeyProblem, metric: KeyMetric, rounds: int) -> KeyWeights:
    """Mix rotary pairs within each frequency and the other dimensions freely.

    Queries are read through folded projections, or through a map of each head in front of RoPE,
    which is what the folded rows are for queries that are the head's own dimensions.
    """
    rotated, layout = problem.rotary_dim, problem.layout
    if layout.k_maps == "per_head":
        return _mapped_per_head(problem, metric, rounds)
    pairs = rotary.solve(metric, layout.k_rotary.frequencies, rotated, problem.joined)
    turned_k = rotary.write(problem.k_weight, problem.k_bias, pairs, rotated, problem.groups)
    turned_q = rotary.read(problem.q_weight, problem.q_bias, pairs, rotated, problem.sharing)
    still = slice(rotated, None)
    encoder, decoder = _latents(problem, metric, rounds, still, layout.k_nope.width)
    k_weight = problem.k_weight[:, still].unflatten(0, (problem.groups, -1)).flatten(1, 2)
    k_bias = problem.k_bias[:, still].unflatten(0, (problem.groups, -1)).flatten(1, 2)
    center = _of_heads(metric.keys.mean, problem.joined, still)
    if layout.k_nope.width == k_weight.shape[1] and not layout.k_nope.packed:
        center = torch.zeros_like(center)
    weights = encoder @ k_weight, torch.einsum("grn,gn->gr", encoder, k_bias - center)
    queries = (
        decoder.mT @ problem.q_weight[:, still],
        torch.einsum("hdr,hd->hr", decoder, problem.q_bias[:, still]),
    )
    return KeyWeights(
        q_weight=torch.cat((turned_q[0], queries[0]), dim=1).flatten(0, 1),
        q_bias=torch.cat((turned_q[1], queries[1]), dim=1).flatten(),
        k_weight=torch.cat((turned_k[0], weights[0]), dim=1).flatten(0, 1),
        k_bias=torch.cat((turned_k[1], weights[1]), dim=1).flatten(),
    )


def _mapped_per_head(problem: KeyProblem, metric: KeyMetric, rounds: int) -> KeyWeights:
    """Leave the query projection as it is and give each head a matrix of its own behind it."""
    heads, d, _hidden = problem.q_weight.shape
    own = torch.eye(d, dtype=torch.float64, device=problem.q_weight.device).expand(heads, d, d)
    layout = problem.layout
    folded_layout = replace(
        layout,
        k_nope=replace(layout.k_nope, maps="folded"),
        k_rotary=replace(layout.k_rotary, maps="folded"),
    )
    folded = replace(
        problem,
        q_weight=own,
        q_bias=torch.zeros_like(problem.q_bias),
        layout=folded_layout,
    )
    solved = _folded(folded, metric, rounds)
    return replace(
        solved,
        q_weight=problem.q_weight.flatten(0, 1),
        q_bias=problem.q_bias.flatten(),
        q_expand=solved.q_weight.unflatten(0, (heads, -1)).mT,
    )


def _latents(
    problem: KeyProblem, metric: KeyMetric, rounds: int, kept: slice, width: int
) -> tuple[Tensor, Tensor]:
    """Return E [g, r, n'] and every query head's D_h [H, d', r] over the ``kept`` dimensions."""
    reading, spread = part_of(metric, problem.joined, kept)
    encoder = best_encoder(reading, spread, width)
    decoder = regression_decoder(encoder, spread)
    heads = decoder.unflatten(1, (problem.joined, -1)).flatten(0, 1)
    heads = heads.repeat_interleave(problem.sharing, dim=0)
    sample = problem.statistics.query_pulls
    if rounds and sample is not None and problem.joined == 1 and width < encoder.shape[-1]:
        tokens = QuerySample(sample.queries[..., kept], sample.pulls[..., kept])
        return alternation.alternate(tokens, encoder, heads, rounds)
    return encoder, heads


def part_of(metric: KeyMetric, joined: int, kept: slice) -> tuple[Tensor, Tensor]:
    """Return M and C [g, n', n'] of the ``kept`` dimensions of every head of each latent."""
    found = []
    for matrix in (metric.reading, metric.keys.covariance):
        heads = matrix.unflatten(-1, (joined, -1)).unflatten(-3, (joined, -1))
        found.append(heads[:, :, kept][..., kept].flatten(-2).flatten(1, 2))
    return found[0], found[1]


def _of_heads(stacked: Tensor, joined: int, kept: slice) -> Tensor:
    """Return the ``kept`` dimensions of every head from [g, n]."""
    return stacked.unflatten(-1, (joined, -1))[..., kept].flatten(-2)


def keep_keys(problem: KeyProblem) -> KeyWeights:
    """Return the base's own projections."""
    return KeyWeights(
        problem.q_weight.flatten(0, 1),
        problem.q_bias.flatten(),
        problem.k_weight.flatten(0, 1),
        problem.k_bias.flatten(),
    )


def keep_centred_keys(problem: KeyProblem) -> KeyWeights:
    """Return the base's own projections, unrotated keys without their mean.

    The softmax does not see what is taken away, and few bits would have to carry it.
    """
    still, mean = slice(problem.rotary_dim, None), problem.keys().mean
    center = torch.zeros_like(problem.k_bias)
    center[:, still] = mean.unflatten(-1, (problem.joined, -1)).flatten(0, 1)[:, still]
    return keep_keys(replace(problem, k_bias=problem.k_bias - center))


def keep_keys_behind_rope(problem: KeyProblem) -> KeyWeights:
    """Return maps behind RoPE that leave whole keys and queries as they are, but for the mean."""
    heads, d, _hidden = problem.q_weight.shape
    same = torch.eye(d, dtype=torch.float64, device=problem.q_weight.device)
    kept = keep_keys(problem)
    return replace(
        kept,
        q_expand=same.expand(heads, d, d),
        k_compress=same.expand(problem.groups, d, d),
        k_shift=-problem.keys().mean.unsqueeze(1).to(same),
    )


def centred(moments: Moments, mean: Tensor) -> Moments:
    """Return the moments with another centre taken away: E[(x - c)(x - c)^T] in place of Cov."""
    shift = moments.mean - mean
    spread = moments.covariance + shift.unsqueeze(-1) * shift.unsqueeze(-2)
    return replace(moments, mean=mean, covariance=spread)
