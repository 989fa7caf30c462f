"""What latents of each width leave out, measured in the loss: the unit of one budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from vdcompress.latents import lowrank, rotary
from vdcompress.latents.keys import KeyMetric, part_of
from vdcompress.latents.lowrank import block_diagonal

if TYPE_CHECKING:
    from vdcompress.load import Base
    from vdcompress.plan import ModelShape
    from vdcompress.statistics import LayerStatistics, Statistics


NEEDS = frozenset({"values", "keys", "value_gradients", "key_gradients"})


@dataclass(frozen=True)
class LayerGains:
    """What one layer loses, in nats per token, by what its latents leave out.

    With g groups a latent has up to n = (kv_heads / g) * d directions, d without the rotary
    dimensions for ``k_nope`` of a family that rotates a part of each head.

    Attributes:
        v: ``v[g][r]``: loss left when every one of g latents of V keeps r of its n directions,
            r = 0..n, non-increasing, 0 at n.
        k_nope: ``k_nope[g][r]``: the same for the unrotated keys, or for whole keys behind RoPE
            where the family rotates whole heads (``k_rotary`` is empty then).
        k_rotary: ``k_rotary[g][f][m]``: loss left when frequency f keeps m virtual heads in every
            latent, m = 0..kv_heads / g.
    """

    v: Mapping[int, tuple[float, ...]]
    k_nope: Mapping[int, tuple[float, ...]]
    k_rotary: Mapping[int, tuple[tuple[float, ...], ...]]


def gains(
    shape: ModelShape, statistics: Statistics, groups: Sequence[int] | None = None
) -> tuple[LayerGains, ...]:
    """Return what each layer's latents leave out at every width.

    An error e of a key or a value costs ``E[(g^T e)^2] / 2`` nats per token, g the gradient of the
    loss there: the divergence of the model's predictions to second order, with keys, values and
    gradients taken as independent (Kronecker-factored Fisher information).

    Args:
        shape: of the model.
        statistics: keys, values and the gradients by both.
        groups: numbers of latents to look at; None is every divisor of the key/value heads.

    Raises:
        UsageError: the statistics lack one of them.
    """
    counts = groups or tuple(n for n in range(1, shape.kv_heads + 1) if shape.kv_heads % n == 0)
    return tuple(_layer_gains(shape, layer, counts) for layer in statistics.layers)


def output_shares(
    base: Base, statistics: Statistics, groups: Sequence[int]
) -> tuple[dict[int, tuple[float, ...]], ...]:
    """Return for each layer what share of its output latents of V leave out, without gradients.

    Args:
        base: its output projections weigh errors.
        statistics: values.
        groups: numbers of latents to look at.

    Returns:
        For each layer ``shares[g][r]``, 1 at r = 0 and 0 at full width.
    """
    found = []
    attentions = base.family.attention_modules(base.model)
    for attention, layer in zip(attentions, statistics.layers, strict=True):
        weight = base.family.weights(attention).o.weight.double()
        heads = weight.unflatten(1, (base.shape.heads, -1)).permute(1, 0, 2)
        gram = (heads.mT @ heads).unflatten(0, (base.shape.kv_heads, -1)).sum(1)
        values = layer.require("values")
        shares = {}
        for count in groups:
            left = _left_out(block_diagonal(gram, count), values.blocks(count).covariance)
            shares[count] = tuple(loss / left[0] if left[0] else 0.0 for loss in left)
        found.append(shares)
    return tuple(found)


def _layer_gains(
    shape: ModelShape, statistics: LayerStatistics, groups: Sequence[int]
) -> LayerGains:
    values, keys = statistics.require("values"), statistics.require("keys")
    by_value = statistics.require("value_gradients")
    by_key = statistics.require("key_gradients")
    partial = shape.rotary_dim < shape.head_dim
    v, k_nope, k_rotary = {}, {}, {}
    for count in groups:
        joined = shape.kv_heads // count
        v[count] = _left_out(by_value.blocks(count).second, values.blocks(count).covariance, 0.5)
        metric = KeyMetric(by_key.blocks(count).second, keys.blocks(count))
        still = slice(shape.rotary_dim if partial else 0, None)
        k_nope[count] = _left_out(*part_of(metric, joined, still), 0.5)
        if partial:
            saved = rotary.gains(metric, shape.rotary_dim, joined).sum(0) / 2
            k_rotary[count] = tuple(_tails(row) for row in saved)
    return LayerGains(v, k_nope, k_rotary)


def _left_out(reading: Tensor, spread: Tensor, unit: float = 1.0) -> tuple[float, ...]:
    """Sum what all latents [g, n, n] lose at each width, r = 0..n."""
    return _tails(lowrank.gains(reading, spread).sum(0) * unit)


def _tails(saved: Tensor) -> tuple[float, ...]:
    """[n] -> the sums from each place on, n + 1 of them."""
    tails = saved.flip(0).cumsum(0).flip(0)
    return (*tails.tolist(), 0.0)
