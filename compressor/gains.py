"""What latents of each width leave out, measured in the loss: the unit of one budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from torch import Tensor

from vdcompress.latents import lowrank, rotary
from vdcompress.latents.balance import rounding_loss
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
        rounding: what rounding the numbers of those latents loses.
    """

    v: Mapping[int, tuple[float, ...]]
    k_nope: Mapping[int, tuple[float, ...]]
    k_rotary: Mapping[int, tuple[tuple[float, ...], ...]]
    rounding: LayerRounding = field(default_factory=lambda: LayerRounding({}, {}, {}))


@dataclass(frozen=True)
class LayerRounding:
    """What rounding one layer's latents loses, in nats per token, per unit of relative error.

    A quantiser whose error has c times the variance of balanced and rotated numbers
    (:mod:`vdcompress.latents.balance`) loses c times this.

    Attributes:
        v: ``v[g][r]`` for g latents of V that keep r directions each, r = 0..n.
        k_nope: ``k_nope[g][r]``: the same for the unrotated keys, or for whole keys behind RoPE.
        k_rotary: ``k_rotary[g][l][f][m]``: the sum of the singular values of the m virtual heads
            that latent l keeps of frequency f. P pairs lose the square of their sum by P, added up
            over latents (:meth:`rotary`).
    """

    v: Mapping[int, tuple[float, ...]]
    k_nope: Mapping[int, tuple[float, ...]]
    k_rotary: Mapping[int, tuple[tuple[tuple[float, ...], ...], ...]]

    def rotary(self, groups: int, counts: Sequence[int]) -> float:
        """Return the loss of rounding the rotary part, per unit of relative error.

        Args:
            groups: latents.
            counts: virtual heads that a latent keeps of each frequency.
        """
        pairs = sum(counts)
        sums = (
            sum(roots[m] for roots, m in zip(latent, counts, strict=True))
            for latent in self.k_rotary.get(groups, ())
        )
        return sum(total**2 for total in sums) / pairs if pairs else 0.0


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


def latent_gains(
    shape: ModelShape, statistics: Statistics, groups: int
) -> tuple[tuple[LayerGains, ...], ...]:
    """Return for each layer what each of its latents leaves out, which :func:`gains` adds up.

    Args:
        shape: of the model.
        statistics: keys, values and the gradients by both.
        groups: latents; as many as key/value heads for one each.
    """
    found = []
    for layer in statistics.layers:
        saved = _saved(shape, layer, groups)
        found.append(tuple(_as_gains({groups: saved.of(latent)}) for latent in range(groups)))
    return tuple(found)


def output_shares(
    base: Base, statistics: Statistics, groups: Sequence[int]
) -> tuple[dict[int, tuple[float, ...]], ...]:
    """Return for each layer what share of its output latents of V leave out, without gradients.

    Args:
        base: its output projections weigh errors.
        statistics: values; where there are none, outputs of a model without grouped queries
            stand for them: what a shared latent leaves out if all its heads attend alike.
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
        values = layer.require("outputs" if layer.values is None else "values")
        shares = {}
        for count in groups:
            left = _left_out(block_diagonal(gram, count), values.blocks(count).covariance)
            shares[count] = tuple(loss / left[0] if left[0] else 0.0 for loss in left)
        found.append(shares)
    return tuple(found)


_Roots = tuple[tuple[tuple[float, ...], ...], ...]


@dataclass(frozen=True)
class _Saved:
    """What each latent saves with each further direction, nats per token, descending.

    Attributes:
        v: [..., n].
        k_nope: [..., n'].
        k_rotary: [..., frequencies, heads of a latent]; None where RoPE rotates whole heads.
    """

    v: Tensor
    k_nope: Tensor
    k_rotary: Tensor | None

    def of(self, latent: int) -> _Saved:
        """Return one latent's."""
        rotary = None if self.k_rotary is None else self.k_rotary[latent]
        return _Saved(self.v[latent], self.k_nope[latent], rotary)

    def total(self) -> _Saved:
        """Return the sums over all latents, each of which keeps as much as the others."""
        rotary = None if self.k_rotary is None else self.k_rotary.sum(0)
        return _Saved(self.v.sum(0), self.k_nope.sum(0), rotary)

    def rounded(self) -> tuple[tuple[float, ...], tuple[float, ...], _Roots]:
        """Return what rounding loses by width of V and of the unrotated keys, and rotary roots."""
        v, k_nope = (
            (0.0, *rounding_loss(part.sqrt()).sum(0).tolist()) for part in (self.v, self.k_nope)
        )
        return v, k_nope, () if self.k_rotary is None else _prefix_sums(self.k_rotary.sqrt())


def _layer_gains(
    shape: ModelShape, statistics: LayerStatistics, groups: Sequence[int]
) -> LayerGains:
    saved = {count: _saved(shape, statistics, count) for count in groups}
    rounded = {count: part.rounded() for count, part in saved.items()}
    rounding = LayerRounding(
        v={count: parts[0] for count, parts in rounded.items()},
        k_nope={count: parts[1] for count, parts in rounded.items()},
        k_rotary={count: parts[2] for count, parts in rounded.items() if parts[2]},
    )
    return replace(
        _as_gains({count: part.total() for count, part in saved.items()}), rounding=rounding
    )


def _saved(shape: ModelShape, statistics: LayerStatistics, groups: int) -> _Saved:
    values, keys = statistics.require("values"), statistics.require("keys")
    by_value = statistics.require("value_gradients")
    by_key = statistics.require("key_gradients")
    partial = shape.rotary_dim < shape.head_dim
    joined = shape.kv_heads // groups
    metric = KeyMetric(by_key.blocks(groups).second, keys.blocks(groups))
    still = slice(shape.rotary_dim if partial else 0, None)
    return _Saved(
        v=lowrank.gains(by_value.blocks(groups).second, values.blocks(groups).covariance) / 2,
        k_nope=lowrank.gains(*part_of(metric, joined, still)) / 2,
        k_rotary=rotary.gains(metric, shape.rotary_dim, joined) / 2 if partial else None,
    )


def _as_gains(saved: Mapping[int, _Saved]) -> LayerGains:
    return LayerGains(
        v={count: _tails(part.v) for count, part in saved.items()},
        k_nope={count: _tails(part.k_nope) for count, part in saved.items()},
        k_rotary={
            count: tuple(_tails(row) for row in part.k_rotary)
            for count, part in saved.items()
            if part.k_rotary is not None
        },
    )


def _prefix_sums(roots: Tensor) -> _Roots:
    """[g, F, m] -> for each latent and frequency the sums of the first 0, 1, ... m roots."""
    sums = roots.cumsum(-1)
    return tuple(tuple((0.0, *frequency) for frequency in latent) for latent in sums.tolist())


def _left_out(reading: Tensor, spread: Tensor) -> tuple[float, ...]:
    """Sum what all latents [g, n, n] lose at each width, r = 0..n."""
    return _tails(lowrank.gains(reading, spread).sum(0))


def _tails(saved: Tensor) -> tuple[float, ...]:
    """[n] -> the sums from each place on, n + 1 of them."""
    tails = saved.flip(0).cumsum(0).flip(0)
    return (*tails.tolist(), 0.0)
