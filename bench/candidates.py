"""Every way to compress K and V that was tried, in one table: those that failed, too.

    VDCOMPRESS_STANDINS=... python bench/candidates.py --device cuda

One calibration, then one row per candidate: perplexity on the three texts, which measure only, and
on the two held-out ones, by which choices are made. Nothing is trained. A row is saved as soon as
it is there; those that the file has are not made again.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import laboratory
import record
import standins
import token_sets
import torch
from laboratory import Layer, LayerMoments, Model, Repair
from torch import Tensor

from vdcompress.latents import lowrank, refit, rotary
from vdcompress.latents.keys import KeyMetric
from vdcompress.latents.values import Latents
from vdcompress.statistics import LayerStatistics, Moments, QuerySample

MODEL = "pythia-70m-standin"
PER_HEAD, PAIRED, SHARED = 40, 128, 192  # widths of one latent
PARTS = 8  # of the tokens, for memory
SHRINK = 1e-3  # of the mean of the Fisher metric's diagonal, added to it


@dataclass(frozen=True, eq=False)
class Subject:
    """The base, what one calibration measured of it, and the windows [count, t] it was done on."""

    model: Model
    moments: tuple[LayerMoments, ...]
    windows: Tensor

    @cached_property
    def samples(self) -> tuple[QuerySample, ...]:
        """Return all tokens' queries and pulls, measured when a candidate first asks."""
        return laboratory.query_samples(self.model, self.windows)


Edit = Callable[[Subject, int, Layer], Layer]  # new weights of the layer with this index
Split = Callable[[Subject, int], tuple[tuple[int, ...], int]]  # kept pairs, width of the rest
Widths = Callable[[Subject], list[int]]  # one width per layer
Fit = Callable[[QuerySample, Tensor, Tensor], tuple[Tensor, Tensor]]  # better E, D


@dataclass(frozen=True)
class Candidate:
    """One row of the table.

    Attributes:
        name: short, unlike every other.
        words: what it does.
        group: the candidates that it competes with.
        build: makes the compressed model.
    """

    name: str
    words: str
    group: str
    build: Callable[[Subject], Model]


# ---------------------------------------------------------------- metrics of keys


@dataclass(frozen=True)
class View:
    """A layer's keys, some dimensions of every head, those of each latent side by side.

    Attributes:
        found: the layer's moments.
        heads: H.
        groups: g.
        kept: which dimensions of a head, d' of d.
        turned: behind RoPE.
    """

    found: LayerMoments
    heads: int
    groups: int
    kept: slice
    turned: bool = False

    def moments(self, name: str) -> Moments:
        """Return moments by name, behind RoPE if the view is."""
        return getattr(self.found, f"turned_{name}" if self.turned else name)

    def cut(self, joint: Tensor) -> Tensor:
        """[H d, H d] -> the blocks of each latent [g, n', n']."""
        pairs = joint.unflatten(1, (self.heads, -1)).unflatten(0, (self.heads, -1))
        kept = pairs[:, self.kept][..., self.kept].flatten(2).flatten(0, 1)
        return lowrank.diagonal_blocks(kept, self.groups)

    def mean(self) -> Tensor:
        """Return the mean of the stacked keys [g, n']."""
        mean = self.moments("keys").mean.unflatten(0, (self.heads, -1))
        return mean[:, self.kept].unflatten(0, (self.groups, -1)).flatten(1)

    def by_head(self, stacked: Tensor) -> Tensor:
        """Clear what lies between different heads in [g, n', n']."""
        joined = self.heads // self.groups
        own = torch.ones(joined, stacked.shape[-1] // joined, stacked.shape[-1] // joined)
        return stacked * torch.block_diag(*own).to(stacked)


def nothing(view: View) -> Tensor:
    spread = view.cut(view.moments("keys").covariance)
    return torch.eye(spread.shape[-1]).to(spread).expand_as(spread)


def queries(view: View) -> Tensor:
    return view.by_head(view.cut(view.moments("queries").second))


def query_scales(view: View) -> Tensor:
    return torch.diag_embed(torch.diagonal(queries(view), dim1=-2, dim2=-1))


def gradients(view: View) -> Tensor:
    return view.cut(view.moments("key_gradients").second)


def gradients_by_head(view: View) -> Tensor:
    return view.by_head(gradients(view))


def plainly(view: View) -> Tensor:
    return view.cut(view.moments("keys").covariance)


def by_attention(view: View) -> Tensor:
    return view.cut(view.moments("keys_by_attention").covariance)


def by_gradient(view: View) -> Tensor:
    return view.cut(view.moments("keys_by_gradient").covariance)


def pulls(view: View) -> Tensor:
    """Sum over the heads of a latent of E[m m^T], m the pull of a head's queries on the keys."""
    per_group = view.moments("pulls").second.unflatten(0, (view.groups, -1)).sum(1)
    return torch.stack([view.cut(joint)[group] for group, joint in enumerate(per_group)])


def half_pulls(view: View) -> Tensor:
    return sum(part / _trace(part) for part in (pulls(view), plainly(view)))


def _trace(stacked: Tensor) -> Tensor:
    return torch.diagonal(stacked, dim1=-2, dim2=-1).sum(-1)[..., None, None]


@dataclass(frozen=True)
class KeyChoice:
    """How an error of the keys is weighed and which keys count, as M and C of the optimum.

    Attributes:
        words: what it is.
        reading: M.
        spread: C.
        decode_plainly: regress with the covariance of all keys, whatever C is.
    """

    words: str
    reading: Callable[[View], Tensor]
    spread: Callable[[View], Tensor]
    decode_plainly: bool = False


KEYS = {
    "pca": KeyChoice("centred PCA of the keys", nothing, plainly),
    "q": KeyChoice("the textbook optimum of q^T k: weighed by the queries", queries, plainly),
    "scale": KeyChoice("one scale per channel, from the queries", query_scales, plainly),
    "n": KeyChoice("weighed by the loss's gradients by the keys (Fisher)", gradients, plainly),
    "nb": KeyChoice("Fisher, each head for itself", gradients_by_head, plainly),
    "n_n": KeyChoice("Fisher, keys counting by their gradient", gradients, by_gradient),
    "q_a": KeyChoice("queries, keys counting by the attention received", queries, by_attention),
    "pca_a": KeyChoice("PCA, keys counting by the attention received", nothing, by_attention),
    "m": KeyChoice("queries, keys as the loss pulls queries by them", queries, pulls),
    "mD": KeyChoice("as m, decoder regressed on all keys", queries, pulls, decode_plainly=True),
    "mix": KeyChoice("queries, half of m and half of all keys", queries, half_pulls),
}


def key_latents(choice: KeyChoice, view: View, width: int) -> tuple[Tensor, Tensor]:
    """Return E [g, r, n'] and D [g, n', r]."""
    spread = choice.spread(view)
    encoder = lowrank.best_encoder(choice.reading(view), spread, width)
    decoded = plainly(view) if choice.decode_plainly else spread
    return encoder, lowrank.regression_decoder(encoder, decoded)


def still(subject: Subject, index: int, groups: int) -> View:
    """View the dimensions that RoPE leaves alone."""
    shape = subject.model.shape
    return View(subject.moments[index], shape.heads, groups, slice(shape.rotary_dim, None))


def rotary_metric(subject: Subject, index: int, groups: int, metric: str) -> KeyMetric:
    """Return M and E[k k^T] of whole stacked keys, from which the rotated pairs are taken."""
    view = View(subject.moments[index], subject.model.shape.heads, groups, slice(None))
    choice = KEYS[metric]
    spread, mean = choice.spread(view), view.mean()
    if choice.spread is not plainly:
        mean = torch.zeros_like(mean)
    return KeyMetric(choice.reading(view), Moments(mean, spread, 0))


# ---------------------------------------------------------------- widths of keys


@cache
def still_gains(subject: Subject, index: int, groups: int, metric: str) -> Tensor:
    """Return what each direction of the dimensions that RoPE leaves alone saves, [n'], falling."""
    view, choice = still(subject, index, groups), KEYS[metric]
    return lowrank.gains(choice.reading(view), choice.spread(view)).sum(0)


@cache
def pair_gains(subject: Subject, index: int, groups: int, metric: str) -> list[tuple[float, int]]:
    """Return what each further virtual head of a frequency saves, with the frequency, falling."""
    asked, shape = rotary_metric(subject, index, groups, metric), subject.model.shape
    found = rotary.gains(asked, shape.rotary_dim, shape.heads // groups).sum(0).tolist()
    return sorted(((gain, f) for f, row in enumerate(found) for gain in row), reverse=True)


def even(pairs: int, rest: int, subject: Subject, _index: int) -> tuple[tuple[int, ...], int]:
    """Keep as many virtual heads of every frequency."""
    count = subject.model.shape.pairs
    return tuple(f for f in range(count) for _ in range(pairs // count)), rest


def by_gain(
    pairs: int, rest: int, groups: int, metric: str, subject: Subject, index: int
) -> tuple[tuple[int, ...], int]:
    """Keep the virtual heads that save most."""
    best = pair_gains(subject, index, groups, metric)[:pairs]
    return tuple(sorted(f for _gain, f in best)), rest


def split_loss(
    subject: Subject, index: int, groups: int, metric: str, total: int, weight: float = 1.0
) -> tuple[float, int]:
    """Return the smallest loss of a latent of ``total`` numbers, and its count of rotated pairs."""
    pairs = [gain for gain, _f in pair_gains(subject, index, groups, metric)]
    rest = still_gains(subject, index, groups, metric)
    return min(
        (weight * sum(pairs[count:]) + float(rest[total - 2 * count :].sum()), count)
        for count in range(len(pairs) + 1)
        if 0 <= total - 2 * count <= len(rest)
    )


def best_split(
    widths: Widths | int, groups: int, metric: str, weight: float, subject: Subject, index: int
) -> tuple[tuple[int, ...], int]:
    """Divide a latent between rotated pairs and the rest by what each saves.

    Args:
        widths: of the latent, over both.
        groups: g.
        metric: that measures gains.
        weight: of the pairs' gains; 2 counts the square of a complex error, not of a real one.
        subject: as always.
        index: of the layer.
    """
    total = widths if isinstance(widths, int) else widths(subject)[index]
    _loss, count = split_loss(subject, index, groups, metric, total, weight)
    return by_gain(count, max(total - 2 * count, 1), groups, metric, subject, index)


def allocate(
    curves: list[Callable[[int], float]], total: int, step: int, least: int, most: int
) -> list[int]:
    """Give the next ``step`` dimensions to the layer that they help most, until all are spent."""
    widths = [least] * len(curves)
    while sum(widths) < total:
        saved = [
            (curve(width) - curve(width + step), -index)
            for index, (curve, width) in enumerate(zip(curves, widths, strict=True))
            if width + step <= most
        ]
        widths[-max(saved)[1]] += step
    return widths


@cache
def key_widths(metric: str, step: int, subject: Subject) -> list[int]:
    """Widths of keys per head, 40 on average, by what a layer loses at its best split."""
    shape, layers = subject.model.shape, range(len(subject.model.layers))

    @cache
    def loss(index: int, width: int) -> float:
        return split_loss(subject, index, shape.heads, metric, width)[0]

    curves = [partial(loss, index) for index in layers]
    return allocate(curves, PER_HEAD * len(layers), step, 8, shape.head_dim)


@cache
def still_widths(metric: str, subject: Subject) -> list[int]:
    """Widths of keys per head, 40 on average, when every layer keeps all rotated pairs."""
    shape, layers = subject.model.shape, range(len(subject.model.layers))

    def loss(index: int, width: int) -> float:
        rest = still_gains(subject, index, shape.heads, metric)
        return float(rest[width - shape.rotary_dim :].sum())

    curves = [partial(loss, index) for index in layers]
    return allocate(curves, PER_HEAD * len(layers), 8, shape.rotary_dim + 8, shape.head_dim)


# ---------------------------------------------------------------- edits of keys


def folded(
    groups: int, metric: str, split: Split, turning: str | None = None, fit: Fit | None = None
) -> Edit:
    """Fold keys.

    Args:
        groups: g.
        metric: of the dimensions that RoPE leaves alone.
        split: what is kept.
        turning: metric of the rotated pairs, if another.
        fit: improves the latents.
    """

    def edit(subject: Subject, index: int, layer: Layer) -> Layer:
        shape, view = subject.model.shape, still(subject, index, groups)
        frequencies, width = split(subject, index)
        asked = rotary_metric(subject, index, groups, turning or metric)
        pairs = rotary.solve(asked, frequencies, shape.rotary_dim, shape.heads // groups)
        latents = key_latents(KEYS[metric], view, width)
        if fit is not None:
            sample = subject.samples[index]
            rest = QuerySample(sample.queries[..., view.kept], sample.pulls[..., view.kept])
            latents = fit(rest, *latents)
        return laboratory.fold_keys(layer, shape, pairs, *latents, view.mean())

    return edit


def behind(groups: int, metric: str, width: int) -> Edit:
    """Compress whole keys by maps behind RoPE."""

    def edit(subject: Subject, index: int, layer: Layer) -> Layer:
        heads = subject.model.shape.heads
        view = View(subject.moments[index], heads, groups, slice(None), turned=True)
        latents = key_latents(KEYS[metric], view, width)
        return laboratory.keys_behind_rope(layer, *latents, view.mean())

    return edit


def exactly(
    rounds: int, ridge: float, sample: QuerySample, encoder: Tensor, decoder: Tensor
) -> tuple[Tensor, Tensor]:
    """Alternate between keys and queries on tokens, each regression solved by normal equations.

    The product's :mod:`vdcompress.latents.alternation` has the mathematics, and solves it by
    conjugate gradients.

    Args:
        rounds: how often both sides are fitted.
        ridge: pull towards the last step, times the features' mean square.
        sample: of every head, [H, tokens, n'].
        encoder: E [H, r, n'].
        decoder: D [H, n', r].
    """
    fitted = []
    for q, m, e, d in zip(sample.queries, sample.pulls, encoder, decoder, strict=True):
        wanted, write, read = (q * m).sum(-1).double(), e, d
        for _ in range(rounds):
            read = _regress(q, m @ write.float().mT, wanted, read, ridge)
            write = _regress(m, q @ read.float(), wanted, write.mT, ridge).mT
        fitted.append((write, read))
    return torch.stack([e for e, _d in fitted]), torch.stack([d for _e, d in fitted])


def _regress(x: Tensor, z: Tensor, wanted: Tensor, prior: Tensor, ridge: float) -> Tensor:
    """Fit wanted [tokens] ~ x^T X z with X [n, r] near the prior, x [tokens, n], z [tokens, r]."""
    size = prior.numel()
    gram, cross = prior.new_zeros(size, size), prior.new_zeros(size)
    for parts in zip(x.chunk(PARTS), z.chunk(PARTS), wanted.chunk(PARTS), strict=True):
        features = (parts[0][:, :, None] * parts[1][:, None, :]).flatten(1).double()
        gram += features.mT @ features
        cross += features.mT @ parts[2]
    pull = ridge * gram.diagonal().mean()
    damped = gram + pull * torch.eye(size).to(gram)
    return torch.linalg.solve(damped, cross + pull * prior.flatten()).view_as(prior)


# ---------------------------------------------------------------- values


@dataclass(frozen=True)
class ValueChoice:
    """How an error of the values is weighed and which values count.

    Attributes:
        words: what it is.
        reading: M [g, n, n] of W_o [H, hidden, d], the layer's moments and g.
        spread: C [g, n, n] of the layer's moments and g.
    """

    words: str
    reading: Callable[[Tensor, LayerMoments, int], Tensor]
    spread: Callable[[LayerMoments, int], Tensor]


def not_weighed(o_weight: Tensor, _found: LayerMoments, groups: int) -> Tensor:
    size = o_weight.shape[0] * o_weight.shape[2] // groups
    return torch.eye(size).to(o_weight).expand(groups, size, size)


def by_output(o_weight: Tensor, _found: LayerMoments, groups: int) -> Tensor:
    return lowrank.block_diagonal(o_weight.mT @ o_weight, groups)


def by_loss(o_weight: Tensor, found: LayerMoments, groups: int) -> Tensor:
    fisher = found.output_gradients.second
    return lowrank.block_diagonal(o_weight.mT @ fisher @ o_weight, groups)


def by_joint_output(o_weight: Tensor, found: LayerMoments, groups: int) -> Tensor:
    wide = o_weight.transpose(0, 1).flatten(1)
    together = lowrank.diagonal_blocks(wide.mT @ wide, groups)
    return (together + by_output(o_weight, found, groups)) / 2


def by_value_gradients(_o_weight: Tensor, found: LayerMoments, groups: int) -> Tensor:
    return lowrank.diagonal_blocks(found.value_gradients.second, groups)


def values_plainly(found: LayerMoments, groups: int) -> Tensor:
    return lowrank.diagonal_blocks(found.values.covariance, groups)


def values_by_gradient(found: LayerMoments, groups: int) -> Tensor:
    return lowrank.diagonal_blocks(found.values_by_gradient.covariance, groups)


def outputs(found: LayerMoments, groups: int) -> Tensor:
    return lowrank.diagonal_blocks(found.outputs.covariance, groups)


def averages(found: LayerMoments, groups: int) -> Tensor:
    """Covariance of all values of a latent, averaged by each of its heads' own attention."""
    return own_averages(found, groups).unflatten(0, (groups, -1)).mean(1)


def own_averages(found: LayerMoments, groups: int) -> Tensor:
    """Covariance of the stacked values, averaged by each head's attention, [H, n, n]."""
    per_head = found.averages.covariance
    joined = len(per_head) // groups
    return torch.stack(
        [lowrank.diagonal_blocks(c, groups)[head // joined] for head, c in enumerate(per_head)]
    )


VALUES = {
    "pca": ValueChoice("centred PCA of the values", not_weighed, values_plainly),
    "w": ValueChoice("weighed by the output projection", by_output, values_plainly),
    "f": ValueChoice("output projection in the loss's metric (Fisher)", by_loss, values_plainly),
    "n": ValueChoice("weighed by gradients by the values", by_value_gradients, values_plainly),
    "n_n": ValueChoice(
        "gradients, values counting by their gradient", by_value_gradients, values_by_gradient
    ),
    "ob": ValueChoice("output projection, each head's own averages", by_output, averages),
    "obf": ValueChoice("Fisher, each head's own averages", by_loss, averages),
    "wj": ValueChoice(
        "output projection, half as if all heads looked alike", by_joint_output, values_plainly
    ),
    "o": ValueChoice("output projection, attention outputs", by_output, outputs),
    "of": ValueChoice("Fisher, attention outputs", by_loss, outputs),
}


def values(groups: int, metric: str, width: int) -> Edit:
    """Compress V; each head's decoder is regressed on its own attention averages."""

    def edit(subject: Subject, index: int, layer: Layer) -> Layer:
        found, shape, choice = subject.moments[index], subject.model.shape, VALUES[metric]
        joined, d = shape.heads // groups, shape.head_dim
        reading = choice.reading(layer.o_weight.double(), found, groups)
        encoder = lowrank.best_encoder(reading, choice.spread(found, groups), width)
        per_head = encoder.repeat_interleave(joined, dim=0)
        stacked = lowrank.regression_decoder(per_head, own_averages(found, groups))
        center = found.values.mean.view(groups, -1)
        seen = found.averages.mean.view(shape.heads, groups, -1)
        decoder, offset = [], []
        for head in range(shape.heads):
            group, rows = head // joined, slice(head % joined * d, (head % joined + 1) * d)
            own = stacked[head, rows]
            moved = own @ (encoder[group] @ (seen[head, group] - center[group]))
            decoder.append(own)
            offset.append(seen[head, group, rows] - moved)
        latents = Latents(encoder, torch.stack(decoder), center, torch.stack(offset))
        return laboratory.fold_values(layer, shape, latents)

    return edit


@dataclass(frozen=True)
class Reading:
    """Answer of alternation: E [H, r, d], new W_o [hidden, H r], loss left per token."""

    encoder: Tensor
    o_weight: Tensor
    o_bias: Tensor
    loss: float


def alternate_values(
    subject: Subject, index: int, width: int, fisher: bool, rounds: int
) -> Reading:
    """Joint refit of W_o and alternation with the encoders, one per head, by the product's refit.

    The product counts errors of the output alike. In the metric F they are counted alike after
    F^(1/2), so that is put behind W_o and taken off again. An identity in the place of W_v makes
    the product answer with the encoders themselves.
    """
    found, shape, layer = subject.moments[index], subject.model.shape, subject.model.layers[index]
    identity = torch.eye(shape.hidden).to(found.outputs.mean)
    root, inverse, scale = identity, identity, 1.0
    if fisher:
        metric = found.output_gradients.second
        scale = float(metric.diagonal().mean())
        root, inverse = lowrank.square_roots(metric / scale + SHRINK * identity)
    o_weight, o_bias = root @ layer.o_weight.double(), root @ layer.o_bias.double()
    spread = lowrank.diagonal_blocks(found.outputs.covariance, shape.heads)
    encoder = lowrank.best_encoder(o_weight.mT @ o_weight, spread, width)
    center = found.outputs.mean.view(shape.heads, -1)
    decoder = lowrank.regression_decoder(encoder, spread)
    problem = replace(
        laboratory.value_problem(layer, shape, shape.heads, width),
        v_weight=torch.eye(shape.head_dim).to(spread).expand_as(spread),
        v_bias=torch.zeros_like(center),
        o_weight=o_weight,
        o_bias=o_bias,
        statistics=LayerStatistics(outputs=found.outputs),
    )
    weights = refit.refit(problem, Latents(encoder, decoder, center, center), rounds)
    encoder = weights.v_weight.unflatten(0, (shape.heads, -1))
    wide = o_weight.transpose(0, 1).flatten(1)
    left = wide - weights.o_weight @ torch.block_diag(*encoder)
    loss = float(((left @ found.outputs.covariance) * left).sum()) * scale
    return Reading(encoder, inverse @ weights.o_weight, inverse @ weights.o_bias, loss)


def alternated(widths: Widths, fisher: bool, rounds: int) -> Edit:
    """Compress V, one latent per head, with a joint refit and alternation."""

    def edit(subject: Subject, index: int, layer: Layer) -> Layer:
        shape, width = subject.model.shape, widths(subject)[index]
        if width == shape.head_dim:
            return layer
        found = alternate_values(subject, index, width, fisher, rounds)
        center = subject.moments[index].outputs.mean.view(shape.heads, -1)
        biases = layer.v_bias.double() - center
        return replace(
            layer,
            v_weight=(found.encoder @ layer.v_weight.double()).float(),
            v_bias=torch.einsum("grn,gn->gr", found.encoder, biases).float(),
            o_weight=laboratory.split_output(found.o_weight, shape.heads).float(),
            o_bias=found.o_bias.float(),
        )

    return edit


def uniform(width: int, subject: Subject) -> list[int]:
    return [width] * len(subject.model.layers)


@cache
def value_widths(metric: str, subject: Subject) -> list[int]:
    """Widths of values per head, 40 on average.

    Args:
        metric: of :data:`VALUES`, whose gains are summed, or "joint": what alternation leaves.
        subject: as always.
    """
    shape, layers = subject.model.shape, subject.model.layers

    @cache
    def loss(index: int, width: int) -> float:
        if metric == "joint":
            if width == shape.head_dim:
                return 0.0
            return alternate_values(subject, index, width, fisher=True, rounds=1).loss
        found, choice = subject.moments[index], VALUES[metric]
        reading = choice.reading(layers[index].o_weight.double(), found, shape.heads)
        saved = lowrank.gains(reading, choice.spread(found, shape.heads)).sum(0)
        return float(saved[width:].sum())

    curves = [partial(loss, index) for index in range(len(layers))]
    return allocate(curves, PER_HEAD * len(layers), 8, 8, shape.head_dim)


# ---------------------------------------------------------------- the list


def build(*edits: Edit, repair: Repair | None = None) -> Callable[[Subject], Model]:
    """Apply edits to every layer, one after the other, then repair."""

    def model(subject: Subject) -> Model:
        layers = list(subject.model.layers)
        for edit in edits:
            layers = [edit(subject, index, layer) for index, layer in enumerate(layers)]
        made = replace(subject.model, layers=tuple(layers))
        if repair is None:
            return made
        return laboratory.repair(subject.model, made, subject.windows, repair)

    return model


REPAIRS = {
    "local": Repair(),
    "sequential": Repair(sequential=True),
    "corrected": Repair(sequential=True, corrected=True),
}
REPAIRED = {
    "local": "W_o refitted on the base's stream",
    "sequential": "W_o refitted on the compressed model's stream",
    "corrected": "the same, and making up for what earlier layers left out",
}


def with_repairs(
    name: str, words: str, group: str, *edits: Edit, only: tuple[str, ...] = tuple(REPAIRS)
) -> list[Candidate]:
    """Return the repairs of one candidate."""
    return [
        Candidate(f"{name}, {how}", f"{words}; {REPAIRED[how]}", group, build(*edits, repair=fit))
        for how, fit in REPAIRS.items()
        if how in only
    ]


def keys_per_head() -> list[Candidate]:
    group, split, rows = "K per head, 24 of 48", partial(even, 8, 24), []
    for name, choice in KEYS.items():
        if name != "nb":
            rows.append(
                Candidate(f"K24 {name}", choice.words, group, build(folded(8, name, split)))
            )
    for name in ("pca", "q", "n", "m"):
        edit = folded(8, name, split)
        rows += with_repairs(f"K24 {name}", KEYS[name].words, group, edit, only=("local",))
    return rows


def keys_shared() -> list[Candidate]:
    split = partial(even, 64, 96)
    return [
        Candidate(
            f"K96 {name}",
            KEYS[name].words,
            "K shared, 96 of 384",
            build(folded(1, name, split, "n")),
        )
        for name in ("pca", "q", "nb", "n", "n_n", "q_a", "m", "mix")
    ]


def keys_rotated() -> list[Candidate]:
    rows = []
    for name in ("q", "n", "pca", "m"):
        for width in (96, 64):
            splits = {
                "even": partial(even, width // 2, 384),
                "by gain": partial(by_gain, width // 2, 384, 1, name),
            }
            heads = {"even": "as many heads of each frequency", "by gain": "heads by their gain"}
            for how, split in splits.items():
                words = f"{KEYS[name].words}; {heads[how]}"
                made = build(folded(1, "q", split, name))
                group = f"rotary shared {width}"
                rows.append(Candidate(f"rotary {width} {name} {how}", words, group, made))
    return rows


def values_alone() -> list[Candidate]:
    rows = []
    for group, groups, width in (
        ("V per head 40", 8, PER_HEAD),
        ("V shared 192", 1, SHARED),
        ("V shared 320", 1, 320),
    ):
        for name, choice in VALUES.items():
            if groups > 1 or name not in ("o", "of"):
                made = build(values(groups, name, width))
                rows.append(Candidate(f"{group} {name}", choice.words, group, made))
    return rows


def keys_behind() -> list[Candidate]:
    rows = []
    for layout, groups, width, names in (
        ("per head 40", 8, PER_HEAD, ("q", "n", "m")),
        ("shared 192", 1, SHARED, ("pca", "q", "n", "n_n", "q_a", "m")),
        ("2 groups of 128", 2, PAIRED, ("q", "n")),
    ):
        for name in names:
            made = build(behind(groups, name, width))
            row = Candidate(
                f"behind {layout} {name}", KEYS[name].words, f"K behind RoPE, {layout}", made
            )
            rows.append(row)
    return rows


def key_splits() -> list[Candidate]:
    rows = []
    for groups, width, rotated, group in (
        (1, SHARED, (48, 64, 80, 96), "K shared 192, split"),
        (2, PAIRED, (32, 40, 48, 64), "K in 2 groups of 128, split"),
    ):
        splits = {
            f"{wide} rotary": (
                f"Fisher, {wide} rotary dimensions",
                partial(by_gain, wide // 2, width - wide, groups, "n"),
            )
            for wide in rotated
        }
        splits["best"] = "Fisher, split by gains", partial(best_split, width, groups, "n", 1.0)
        splits["best, pairs twice"] = (
            "Fisher, split by gains, a pair's counted as a complex error's: twice what it is",
            partial(best_split, width, groups, "n", 2.0),
        )
        rows += [
            Candidate(f"K{groups}x{width} {name}", words, group, build(folded(groups, "n", split)))
            for name, (words, split) in splits.items()
        ]
    split = partial(even, 32, 128)
    words = "textbook optimum, 64 rotary dimensions, as many heads of each frequency"
    made = build(folded(1, "q", split))
    rows.append(Candidate("K1x192 textbook", words, "K shared 192, split", made))
    return rows


def repairs() -> list[Candidate]:
    rows = with_repairs("V40", "V per head 40, Fisher", "repair", values(8, "of", PER_HEAD))
    edit = values(1, "obf", SHARED)
    rows += with_repairs("V192", "V shared 192, Fisher, own averages", "repair", edit)
    pairs_twice = partial(best_split, SHARED, 1, "n", 2.0)
    for name, words, edits in (
        ("multi-query 192", "K folded", (folded(1, "n", pairs_twice), values(1, "obf", SHARED))),
        ("multi-query 192 behind", "K behind RoPE", (behind(1, "n", SHARED), edit)),
        (
            "2 groups of 128",
            "K folded",
            (
                folded(2, "n", partial(best_split, PAIRED, 2, "n", 2.0)),
                values(2, "obf", PAIRED),
            ),
        ),
    ):
        rows.append(Candidate(name, f"{words}, Fisher, no repair", "repair", build(*edits)))
        only = ("local",) if name == "2 groups of 128" else tuple(REPAIRED)
        rows += with_repairs(name, f"{words}, Fisher", "repair", *edits, only=only)
    edit = alternated(partial(uniform, PER_HEAD), False, 2)
    for how, sequential in (("local", False), ("sequential", True)):
        for ridge in (1e-4, 1e-3):
            fit = Repair(sequential, corrected=True, block=True, ridge=ridge)
            words = f"V per head 40, 2 rounds; W_o and the MLP's down projection, {how}"
            name = f"V40 2 rounds, block, {how}, ridge {ridge:g}"
            rows.append(Candidate(name, words, "repair", build(edit, repair=fit)))
    words = "V per head 40, 2 rounds of alternation"
    return rows + with_repairs("V40 2 rounds", words, "repair", edit, only=("corrected",))


def alternations() -> list[Candidate]:
    rows = []
    for fisher in (False, True):
        metric = "the loss's metric (Fisher)" if fisher else "the plain output"
        for rounds in (0, 2, 6):
            made = build(alternated(partial(uniform, PER_HEAD), fisher, rounds))
            words = f"V per head 40: joint refit, {rounds} rounds of alternation in {metric}"
            name = f"V40 {rounds} rounds{' Fisher' if fisher else ''}"
            rows.append(Candidate(name, words, "alternation", made))
    split = partial(even, 8, 24)
    for rounds, ridge in ((1, 1e-3), (3, 1e-3), (3, 1e-2)):
        edit = folded(8, "m", split, None, partial(exactly, rounds, ridge))
        words = f"K per head 24: alternation of keys with queries on tokens, {rounds} rounds"
        name = f"K24 tokens {rounds} rounds, ridge {ridge:g}"
        rows.append(Candidate(name, words, "alternation", build(edit)))
    rows += with_repairs(name, words, "alternation", edit, only=("local",))
    return rows


def dropped(metric: str, widths: Widths | int = 40) -> Edit:
    """Fold keys per head, with the frequencies and width that lose least."""
    return folded(8, metric, partial(best_split, widths, 8, metric, 1.0))


def frequencies() -> list[Candidate]:
    return [
        Candidate(
            f"K40 dropping {name}",
            f"{KEYS[name].words}; frequencies dropped per layer where others save more",
            "K per head 40, frequencies",
            build(dropped(name)),
        )
        for name in ("n", "m")
    ]


def allocations() -> list[Candidate]:
    rows, group = [], "allocation"
    for name in ("n", "m"):
        for step in (8, 4):
            edit = dropped(name, partial(key_widths, name, step))
            words = f"K per head, 40 on average, widths per layer in steps of {step}, metric {name}"
            rows.append(Candidate(f"K layers {name} step {step}", words, group, build(edit)))
    rows += with_repairs("K layers m step 4", words, group, edit, only=("local",))
    for name in ("n", "m"):
        edit = folded(8, name, partial(all_pairs, partial(still_widths, name)))
        words = f"K per head, 40 on average, all rotated pairs kept, metric {name}"
        rows.append(Candidate(f"K layers {name}, all pairs", words, group, build(edit)))
    for name in ("joint", "of", "o"):
        for fisher in (False, True):
            edit = alternated(partial(value_widths, name), fisher, 2)
            words = f"V per head, 40 on average, widths by {name}, 2 rounds of alternation"
            label = f"V layers {name}{' Fisher' if fisher else ''}"
            rows.append(Candidate(label, words, group, build(edit)))
    return rows + both_sides()


def all_pairs(widths: Widths, subject: Subject, index: int) -> tuple[tuple[int, ...], int]:
    """Keep all rotated pairs of every head, and the rest of the width."""
    shape = subject.model.shape
    return tuple(range(shape.pairs)), widths(subject)[index] - shape.rotary_dim


def both_sides() -> list[Candidate]:
    rows, group = [], "K and V per head 320/320"
    keys = {
        "uniform m": ("K uniform, metric m", folded(8, "m", partial(even, 8, 24))),
        "dropping m": ("K uniform with frequencies dropped, metric m", dropped("m")),
        "layers m": ("K by layers, metric m", dropped("m", partial(key_widths, "m", 8))),
        "layers n": ("K by layers, Fisher", dropped("n", partial(key_widths, "n", 8))),
        "behind m": ("K behind RoPE, metric m", behind(8, "m", PER_HEAD)),
    }
    sides: dict[str, Widths] = {
        "uniform": partial(uniform, PER_HEAD),
        "layers": partial(value_widths, "joint"),
    }
    for name, (words, edit) in keys.items():
        for how, widths in sides.items():
            edits = edit, alternated(widths, True, 2)
            label, said = f"K {name}, V {how}", f"{words}; V {how}, 2 rounds, Fisher"
            rows.append(Candidate(label, said, group, build(*edits)))
            rows += with_repairs(label, said, group, *edits, only=("local", "corrected"))
    return rows


def candidates() -> list[Candidate]:
    """Return all of them."""
    return [
        *keys_per_head(),
        *keys_shared(),
        *keys_rotated(),
        *values_alone(),
        *keys_behind(),
        *key_splits(),
        *repairs(),
        *alternations(),
        *frequencies(),
        *allocations(),
    ]


# ---------------------------------------------------------------- the run


def layout(model: Model) -> list[dict[str, Any]]:
    """Return what each layer's latents keep: groups and widths, heads kept per frequency."""
    count = range(model.shape.pairs)
    rows = []
    for layer in model.layers:
        maps = layer.behind
        groups, width, out = layer.k_weight.shape if maps is None else maps.compress.shape
        rows.append(
            {
                "k_groups": groups,
                "k_width": width if maps is None else out,
                "frequencies": [layer.frequencies.count(f) for f in count],
                "v_groups": layer.v_weight.shape[0],
                "v_width": layer.v_weight.shape[1],
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--windows", type=int, default=token_sets.WINDOWS)
    parser.add_argument("--samples", type=int, help="calibration windows, default all")
    parser.add_argument("--length", type=int, default=token_sets.WINDOW, help="tokens per window")
    parser.add_argument("--only", help="keep candidates whose name or group holds this")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    file = f"candidates-{MODEL}"
    every = candidates()
    places = {row.name: place for place, row in enumerate(every)}
    kept = record.earlier_rows(file, out=options.out)
    there = {row["name"] for row in kept}
    rows = [
        row
        for row in every
        if row.name not in there
        and (not options.only or options.only in f"{row.group}: {row.name}")
    ]
    sets = token_sets.read()
    texts = {name: sets[name] for name in (*standins.TEXTS, *token_sets.HELD_OUT)}
    windows = sets[token_sets.CALIBRATION][: options.samples, : options.length]
    model = laboratory.load(standins.model(MODEL), options.device)
    started = time.perf_counter()
    subject = Subject(model, laboratory.measure(model, windows), windows)
    body: dict[str, Any] = {
        "model": MODEL,
        "windows": options.windows,
        "length": options.length,
        "calibration": {
            "data": "train.jsonl.gz",
            "set": token_sets.CALIBRATION,
            "samples": len(windows),
            "seq_len": windows.shape[1],
            "balance": token_sets.BALANCE,
            "seconds": time.perf_counter() - started,
        },
        "base": figures(model, texts, options),
        "rows": kept,
    }
    for row in rows:
        made = row.build(subject)
        found = figures(made, texts, options)
        said = " / ".join(f"{text['perplexity']:.4f}" for text in found.values())
        print(f"{row.group}: {row.name}: {said}", flush=True)
        body["rows"].append(
            {
                "name": row.name,
                "words": row.words,
                "group": row.group,
                "texts": found,
                "layers": layout(made),
                "measured": record.environment(),
            }
        )
        body["rows"].sort(key=lambda found: places[found["name"]])
        print(record.write(file, body, out=options.out))


def figures(
    model: Model, texts: dict[str, Tensor], options: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """Return the perplexity on every text by its name."""
    windows, length = options.windows, options.length
    return {
        name: {"perplexity": laboratory.perplexity(model, ids, windows, length)}
        for name, ids in texts.items()
    }


if __name__ == "__main__":
    main()
