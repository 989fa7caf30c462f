"""Attention layers that do not exist: weights and dependent samples of what runs through them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vdcompress.latents.keys import KeyMetric, KeyProblem
from vdcompress.latents.values import ValueProblem
from vdcompress.modeling.layout import LayerLayout, NopePart, Part, RotaryPart
from vdcompress.modeling.rope import rotate
from vdcompress.plan import ModelShape
from vdcompress.statistics import LayerStatistics, Moments, MomentSum

D, HIDDEN, TOKENS = 8, 40, 3000


@dataclass(frozen=True)
class Layer:
    """A layer and samples of what runs through it.

    Attributes:
        problem: its V path, what an initialiser gets.
        keys_problem: its K path, likewise; nothing is rotated.
        inputs: [n, hidden], what V is computed from.
        values: [n, G, d].
        outputs: [n, H, d], what attention returns.
        output_gradients: [n, H, d], of a loss that reads the layer's output.
        value_gradients: [n, G, d].
    """

    problem: ValueProblem
    keys_problem: KeyProblem
    inputs: Tensor
    values: Tensor
    outputs: Tensor
    output_gradients: Tensor
    value_gradients: Tensor

    @property
    def stacked(self) -> Tensor:
        """[n, H, n'], the stacked values of each head's latent as its attention averages them."""
        latents, heads = self.problem.groups, self.outputs.shape[1]
        joined = self.values.flatten(1).unflatten(1, (latents, -1))
        return torch.stack([mixed(joined[:, h * latents // heads], h) for h in range(heads)], 1)

    @property
    def y(self) -> Tensor:
        """[n, hidden], what the base's output projection writes."""
        problem = self.problem
        return torch.einsum("nhd,hyd->ny", self.outputs, problem.o_weight) + problem.o_bias


def make_layer(
    heads: int = 4,
    groups: int = 4,
    width: int = 3,
    rank: int = HIDDEN,
    spread: float = 1.0,
    latents: int | None = None,
) -> Layer:
    """Draw a layer whose outputs have a mean, unequal variances and dependent heads.

    Args:
        heads: H.
        groups: G, key/value heads.
        width: of a latent.
        rank: of the inputs.
        spread: of the inputs; zero makes all tokens alike.
        latents: g; None is one for each key/value head.
    """
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    sharing, latents = heads // groups, latents or groups
    inputs = (normal(TOKENS, rank) @ normal(rank, HIDDEN)) * spread + normal(HIDDEN)
    v_weight, v_bias = normal(groups, D, HIDDEN) / 6, normal(groups, D)
    o_weight, o_bias = normal(heads, HIDDEN, D) / 5, normal(HIDDEN)
    values = torch.einsum("nx,gdx->ngd", inputs, v_weight) + v_bias
    outputs = torch.stack([mixed(values[:, h // sharing], h) for h in range(heads)], dim=1)
    # the loss reads some directions of the layer's output, and some tokens more than others
    wanted = normal(TOKENS, 9) @ normal(9, HIDDEN) * normal(TOKENS, 1).exp()
    output_gradients = torch.einsum("ny,hyd->nhd", wanted, o_weight)
    backward = torch.stack([unmixed(output_gradients[:, h], h) for h in range(heads)], dim=1)
    value_gradients = backward.unflatten(1, (groups, sharing)).sum(2)
    q_weight, k_weight = normal(heads, D, HIDDEN) / 6, normal(groups, D, HIDDEN) / 6
    q_bias, k_bias = normal(heads, D), normal(groups, D)
    queries = torch.einsum("nx,hdx->nhd", inputs, q_weight) + q_bias
    keys = torch.einsum("nx,gdx->ngd", inputs.roll(1, dims=0), k_weight) + k_bias
    pull = queries.unflatten(1, (groups, sharing)) * normal(TOKENS, groups, sharing, 1)
    statistics = LayerStatistics(
        values=moments(values.flatten(1)),
        outputs=moments(outputs.flatten(1)),
        keys=moments(keys.flatten(1)),
        queries=moments(queries),
        value_gradients=moments(value_gradients.flatten(1)),
        key_gradients=moments(pull.sum(2).flatten(1)),
        output_gradients=moments(output_gradients),
    )
    problem = ValueProblem(
        v_weight.unflatten(0, (latents, -1)).flatten(1, 2),
        v_bias.unflatten(0, (latents, -1)).flatten(1),
        o_weight,
        o_bias,
        width,
        statistics,
        torch.Generator().manual_seed(1),
    )
    layout = LayerLayout(Part(groups, D), NopePart(latents, width), RotaryPart(latents, 0))
    keys_problem = KeyProblem(
        q_weight, q_bias, k_weight, k_bias, 0, layout, statistics, torch.Generator().manual_seed(1)
    )
    return Layer(problem, keys_problem, inputs, values, outputs, output_gradients, value_gradients)


def mixed(x: Tensor, head: int) -> Tensor:
    """What a head's attention returns of x [n, ...]: half of each token's own, half another's."""
    return 0.5 * x + 0.5 * x.roll(head + 1, dims=0)


def unmixed(x: Tensor, head: int) -> Tensor:
    """The gradient by x of what :func:`mixed` returns."""
    return 0.5 * x + 0.5 * x.roll(-head - 1, dims=0)


def moments(x: Tensor) -> Moments:
    """Return the moments of x [n, ...]."""
    total = MomentSum()
    total.add(x)
    found = total.moments()
    assert found is not None
    return found


@dataclass(frozen=True)
class Keys:
    """A layer's K path and samples of what attention sees, behind RoPE.

    Attributes:
        problem: what solves the path.
        inputs: [n, hidden].
        positions: [n].
        frequencies: inverse ones [F].
        queries: [n, H, d].
        keys: [n, G, d].
        gradients: [n, G, d].
    """

    problem: KeyProblem
    inputs: Tensor
    positions: Tensor
    frequencies: Tensor
    queries: Tensor
    keys: Tensor
    gradients: Tensor

    @property
    def metric(self) -> KeyMetric:
        """The loss's: gradients weigh the centred keys."""
        count = self.problem.groups
        return KeyMetric(
            moments(self.gradients.flatten(1)).blocks(count).second,
            moments(self.keys.flatten(1)).blocks(count),
        )

    def with_layout(self, layout: LayerLayout) -> Keys:
        """Return the same layer with another layout."""
        return replace(self, problem=replace(self.problem, layout=layout))


def make_keys(
    shape: ModelShape, layout: LayerLayout, tokens: int = 4000, shift: float = 0.0
) -> Keys:
    """Draw a layer's queries and keys at random positions; heads depend on each other.

    Args:
        shape: of the model.
        layout: what the cache keeps.
        tokens: n.
        shift: added to all unrotated dimensions of every key.
    """
    draw = torch.Generator().manual_seed(7)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=draw, dtype=torch.float64)

    d, hidden, pairs = shape.head_dim, shape.hidden, shape.rotary_dim // 2
    common = normal(hidden, hidden) * torch.logspace(0, -1.5, hidden, dtype=torch.float64)
    inputs = normal(tokens, hidden) @ common + normal(hidden)
    q_weight = normal(shape.heads, d, hidden) / hidden**0.5
    k_weight = (normal(shape.kv_heads, d, hidden) + normal(d, hidden)) / hidden**0.5
    q_bias, k_bias = normal(shape.heads, d), normal(shape.kv_heads, d)
    k_bias[:, shape.rotary_dim :] += shift
    frequencies = torch.logspace(0, -2, max(pairs, 1), dtype=torch.float64)[:pairs]
    positions = torch.randint(0, 100_000, (tokens,), generator=draw)
    queries = torch.einsum("nx,hdx->nhd", inputs.roll(3, dims=0), q_weight) + q_bias
    keys = torch.einsum("nx,gdx->ngd", inputs, k_weight) + k_bias
    queries, keys = (turned(x, positions, frequencies) for x in (queries, keys))
    read = queries.unflatten(1, (shape.kv_heads, -1))
    gradients = (read * normal(tokens, *read.shape[1:3], 1)).sum(2)
    statistics = LayerStatistics(
        keys=moments(keys.flatten(1)),
        queries=moments(queries),
        key_gradients=moments(gradients.flatten(1)),
    )
    problem = KeyProblem(
        q_weight,
        q_bias,
        k_weight,
        k_bias,
        shape.rotary_dim,
        layout,
        statistics,
        torch.Generator().manual_seed(1),
    )
    return Keys(problem, inputs, positions, frequencies, queries, keys, gradients)


def turned(x: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    """Turn x [n, heads, width] by RoPE at positions [n], as the modelling files do, in float64."""
    angles = positions[:, None] * frequencies
    by_head = x.transpose(0, 1).unsqueeze(0)
    return rotate(by_head, angles.cos()[None], angles.sin()[None])[0].transpose(0, 1)
