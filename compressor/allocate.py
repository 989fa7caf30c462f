"""Spend numbers of cache where they keep the most: widths of layers, sides and parts of K.

Everything here is arithmetic on :class:`~vdcompress.gains.LayerGains`; no model is touched.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vdcompress.bits import relative_error

if TYPE_CHECKING:
    from vdcompress.gains import LayerGains
    from vdcompress.modeling.layout import LayerLayout

STEP = 8
REACH = 8
NOTHING = 1e-15
Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Curve:
    """What one side of one layer loses at each size that it may have.

    Attributes:
        sizes: numbers of cache per token, ascending.
        losses: nats per token left out at each size.
    """

    sizes: tuple[int, ...]
    losses: tuple[float, ...]


@dataclass(frozen=True)
class Split:
    """How a K latent divides its width.

    Attributes:
        nope: unrotated dimensions.
        frequencies: the base frequency of each kept pair, ascending, one entry per virtual head.
        k_nope: loss of the first part.
        k_rotary: loss of the second.
    """

    nope: int
    frequencies: tuple[int, ...]
    k_nope: float
    k_rotary: float

    @property
    def loss(self) -> float:
        """Loss of both parts."""
        return self.k_nope + self.k_rotary


class Keys:
    """The best split of every K width of one layer, exact for curves of any form.

    Args:
        gains: of the layer.
        groups: how many latents of K it keeps.
    """

    def __init__(self, gains: LayerGains, groups: int) -> None:
        self._nope = np.array(gains.k_nope[groups], dtype=np.float64)
        self._rotary, self._chosen = _cheapest(gains.k_rotary.get(groups, ()))

    @property
    def full(self) -> int:
        """The width that keeps everything."""
        return self.most(self.pairs)

    @property
    def pairs(self) -> int:
        """All rotary pairs of a latent."""
        return len(self._rotary) - 1

    def rotary(self, pairs: int) -> tuple[tuple[int, ...], float]:
        """Return which frequencies so many pairs keep at the least loss, and that loss."""
        return self._frequencies(pairs), float(self._rotary[pairs])

    def most(self, pairs: int) -> int:
        """Return the largest width that keeps this many rotary pairs."""
        return len(self._nope) - 1 + 2 * pairs

    def best(self, width: int, pairs: int | None = None) -> Split:
        """Return the split of a width that loses least.

        Args:
            width: of one latent.
            pairs: rotary pairs that it must keep; None leaves the number free.
        """
        low = max(0, -(-(width - (len(self._nope) - 1)) // 2))
        numbers = (
            np.arange(low, min(self.pairs, width // 2) + 1) if pairs is None else np.array([pairs])
        )
        losses = self._nope[width - 2 * numbers] + self._rotary[numbers]
        kept = int(numbers[int(np.argmin(losses))])
        nope = width - 2 * kept
        return Split(
            nope, self._frequencies(kept), float(self._nope[nope]), float(self._rotary[kept])
        )

    def _frequencies(self, pairs: int) -> tuple[int, ...]:
        counts = []
        for chosen in reversed(self._chosen):
            counts.append(int(chosen[pairs]))
            pairs -= counts[-1]
        return tuple(index for index, count in enumerate(reversed(counts)) for _ in range(count))


class Segment(NamedTuple):
    """An edge of a curve's lower hull."""

    rate: float
    curve: int
    start: int
    end: int


def widths(full: int) -> tuple[int, ...]:
    """Return the widths that a latent of ``full`` directions may have: steps of 8, and all."""
    return (*range(STEP, full, STEP), full)


def value_curve(gains: LayerGains, groups: int) -> Curve:
    """Return what V of one layer loses with ``groups`` latents."""
    losses = gains.v[groups]
    allowed = widths(len(losses) - 1)
    return Curve(tuple(groups * w for w in allowed), tuple(losses[w] for w in allowed))


def key_curve(gains: LayerGains, groups: int, pairs: int | None = None) -> Curve:
    """Return what K of one layer loses with ``groups`` latents, each width split at its best.

    Args:
        gains: of the layer.
        groups: latents of K.
        pairs: rotary pairs that every width must keep; None leaves the number free.
    """
    keys = Keys(gains, groups)
    allowed = [w for w in widths(keys.full) if pairs is None or 2 * pairs <= w <= keys.most(pairs)]
    losses = tuple(keys.best(w, pairs).loss for w in allowed)
    return Curve(tuple(groups * w for w in allowed), losses)


def total(curves: Sequence[Curve]) -> Curve:
    """Return the curve of several that must keep one width."""
    sizes = tuple(sum(row) for row in zip(*(curve.sizes for curve in curves), strict=True))
    losses = tuple(sum(row) for row in zip(*(curve.losses for curve in curves), strict=True))
    return Curve(sizes, losses)


def predicted_loss(
    layers: Sequence[LayerLayout], gains: Sequence[LayerGains]
) -> tuple[dict[str, float], ...]:
    """Return for each layer what ``v``, ``k_nope`` and ``k_rotary`` lose, in nats per token:
    what they leave out and what rounding them adds."""
    return tuple(_layer_loss(layer, gain) for layer, gain in zip(layers, gains, strict=True))


def allocate(curves: Sequence[Curve], budget: int) -> tuple[int, ...]:
    """Choose a size for every curve, all together within a budget, at little loss.

    Greedy by gain per number along the curves' lower hulls, which is optimal but for the last
    steps; then the exact optimum within a few steps around that, until it stays where it is.

    Args:
        curves: of the layers and sides.
        budget: numbers per token.

    Returns:
        An index into the sizes of each curve.

    Raises:
        ValueError: the smallest sizes are above the budget.
    """
    chosen = [0] * len(curves)
    left = budget - _size(curves, chosen)
    if left < 0:
        raise ValueError(f"the budget {budget} is below the smallest sizes")
    for edge in sorted(_segments(curves), key=lambda edge: -edge.rate):
        sizes = curves[edge.curve].sizes
        cost = sizes[edge.end] - sizes[edge.start]
        if chosen[edge.curve] == edge.start and cost <= left:
            chosen[edge.curve] = edge.end
            left -= cost
    while True:
        better = _refined(curves, chosen, budget)
        if _loss(curves, better) >= _loss(curves, chosen) - NOTHING:
            return tuple(chosen)
        chosen = better


def _size(curves: Sequence[Curve], chosen: Sequence[int]) -> int:
    return sum(curve.sizes[i] for curve, i in zip(curves, chosen, strict=True))


def _loss(curves: Sequence[Curve], chosen: Sequence[int]) -> float:
    return sum(curve.losses[i] for curve, i in zip(curves, chosen, strict=True))


def _refined(curves: Sequence[Curve], chosen: Sequence[int], budget: int) -> list[int]:
    """Return the best choice of those within ``REACH`` steps of a given one on every curve.

    Sums of sizes are followed exactly, as long as they stay within some steps of the given one.
    """
    unit = math.gcd(*(b - a for curve in curves for a, b in itertools.pairwise(curve.sizes)))
    if unit == 0:
        return list(chosen)
    steps = (b - a for curve in curves for a, b in itertools.pairwise(curve.sizes))
    span = REACH * max(steps) // unit
    best = np.full(2 * span + 1, np.inf)
    best[span] = 0.0
    trail = []
    for curve, at in zip(curves, chosen, strict=True):
        reached, taken = np.full_like(best, np.inf), np.zeros(len(best), dtype=np.int64)
        for index in range(max(0, at - REACH), min(len(curve.sizes), at + REACH + 1)):
            moved = _shifted(best, (curve.sizes[index] - curve.sizes[at]) // unit)
            moved += curve.losses[index]
            better = moved < reached
            reached[better], taken[better] = moved[better], index
        best = reached
        trail.append(taken)
    spare = (budget - _size(curves, chosen)) // unit
    place = int(np.argmin(best[: span + min(spare, span) + 1]))
    found = []
    for curve, at, taken in zip(curves[::-1], chosen[::-1], trail[::-1], strict=True):
        found.append(int(taken[place]))
        place -= (curve.sizes[found[-1]] - curve.sizes[at]) // unit
    return found[::-1]


def _shifted(values: Numbers, by: int) -> Numbers:
    """Return values moved along by some places; what comes in is infinite."""
    moved = np.full_like(values, np.inf)
    if by >= 0:
        moved[by:] = values[: len(values) - by]
    else:
        moved[:by] = values[-by:]
    return moved


def _segments(curves: Sequence[Curve]) -> Iterator[Segment]:
    for number, curve in enumerate(curves):
        hull: list[int] = []
        for index in range(len(curve.sizes)):
            while len(hull) > 1 and _slope(curve, hull[-1], index) < _slope(curve, *hull[-2:]):
                hull.pop()
            hull.append(index)
        for start, end in itertools.pairwise(hull):
            if (rate := -_slope(curve, start, end)) > 0:
                yield Segment(rate, number, start, end)


def _slope(curve: Curve, start: int, end: int) -> float:
    cost = curve.sizes[end] - curve.sizes[start]
    return (curve.losses[end] - curve.losses[start]) / cost


def _cheapest(curves: Sequence[Sequence[float]]) -> tuple[Numbers, list[NDArray[np.int64]]]:
    """Combine frequencies: the least loss for each number of pairs, and how it came about.

    Returns:
        Losses [pairs + 1], and for each frequency how many virtual heads it keeps when it and
        those before it keep 0, 1, ... pairs together.
    """
    best, choices = np.zeros(1), []
    for curve in curves:
        combined = np.full(len(best) + len(curve) - 1, np.inf)
        chosen = np.zeros(len(combined), dtype=np.int64)
        for kept, loss in enumerate(curve):
            reached, part = best + loss, slice(kept, kept + len(best))
            better = reached < combined[part]
            combined[part] = np.where(better, reached, combined[part])
            chosen[part] = np.where(better, kept, chosen[part])
        best = combined
        choices.append(chosen)
    return best, choices


def _layer_loss(layer: LayerLayout, gains: LayerGains) -> dict[str, float]:
    rotary = gains.k_rotary.get(layer.k_groups, ())
    kept = [layer.k_rotary.frequencies.count(index) for index in range(len(rotary))]
    whole_heads = not rotary and layer.k_rotary.width > 0
    left_out = {
        "v": gains.v[layer.v_groups][layer.v_head_dim],
        "k_nope": 0.0 if whole_heads else gains.k_nope[layer.k_groups][layer.k_nope.width],
        "k_rotary": sum((curve[m] for curve, m in zip(rotary, kept, strict=True)), 0.0),
    }
    rounded = _rounding_loss(layer, gains, kept)
    return {part: loss + rounded.get(part, 0.0) for part, loss in left_out.items()}


def _rounding_loss(layer: LayerLayout, gains: LayerGains, kept: Sequence[int]) -> dict[str, float]:
    """Return what rounding adds to each packed part."""
    rounding, found = gains.rounding, {}
    if layer.v.packed:
        found["v"] = relative_error(layer.v) * rounding.v[layer.v_groups][layer.v_head_dim]
    if layer.k_nope.packed:
        at = rounding.k_nope[layer.k_groups][layer.k_nope.width]
        found["k_nope"] = relative_error(layer.k_nope) * at
    if layer.k_rotary.packed:
        at = rounding.rotary(layer.k_groups, kept)
        found["k_rotary"] = relative_error(layer.k_rotary) * at
    return found
