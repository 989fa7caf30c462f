"""Turn a request into layouts: widths from the shape alone, or from calibrated gains."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from vdcompress import serving
from vdcompress.allocate import Curve, Keys, allocate, key_curve, total, value_curve
from vdcompress.bit_budget import Choices, spend
from vdcompress.bits import exact_tokens, with_bits
from vdcompress.cost import with_cheaper_maps
from vdcompress.errors import PlanError
from vdcompress.modeling.layout import LayerLayout, NopePart, Part, RotaryPart
from vdcompress.request import NUMBER_BITS, VLLM, Request

if TYPE_CHECKING:
    from vdcompress.gains import LayerGains
    from vdcompress.plan import ModelShape

Gains = Sequence["LayerGains"]


@dataclass(frozen=True)
class Widths:
    """The width of a V latent and of a K latent in every layer, and how many there are.

    Attributes:
        v_groups: latents of V per layer.
        k_groups: latents of K per layer.
        v: widths by layer.
        k: widths by layer.
        loss: nats per token, as the gains predict.
        common: whether the target's main backend takes these widths.
    """

    v_groups: int
    k_groups: int
    v: tuple[int, ...]
    k: tuple[int, ...]
    loss: float
    common: bool = True


def layers_for(shape: ModelShape, request: Request, gains: Gains | None) -> tuple[LayerLayout, ...]:
    """Return the layout of every layer for a request that fits the shape.

    Args:
        shape: of the base.
        request: without problems.
        gains: of every layer; None where the shape alone decides.

    Raises:
        PlanError: gains are missing, or no plan is within the budget.
    """
    if request.kv_budget is None:
        layers = (with_cheaper_maps(la, shape) for la in _asked(shape, request, gains))
        return tuple(with_bits(layer, request, shape) for layer in layers)
    spent = _spent_on_bits if request.packs else _budgeted
    found = spent(shape, request, _required(gains, request))
    return tuple(with_cheaper_maps(layer, shape) for layer in found)


def _asked(shape: ModelShape, request: Request, gains: Gains | None) -> tuple[LayerLayout, ...]:
    """Return the layouts of a request that names its widths."""
    count, (v_groups, k_groups) = shape.layers, request.groups(shape)
    full = shape.full_layout()
    values, keys = (full.v,) * count, ((full.k_nope, full.k_rotary),) * count
    if request.v_dim is not None:
        widths = (request.v_dim // v_groups,) * count
        if request.by_layer:
            curves = [value_curve(layer, v_groups) for layer in _required(gains, request)]
            widths = _spread(curves, request.v_dim * count, v_groups, "v_dim")
        values = tuple(Part(v_groups, width) for width in widths)
    if request.k_dim is not None:
        pairs = _pairs(shape, request, k_groups)
        widths = (request.k_dim // k_groups,) * count
        if request.by_layer:
            curves = [key_curve(layer, k_groups, pairs) for layer in _required(gains, request)]
            widths = _spread(curves, request.k_dim * count, k_groups, "k_dim")
        by_layer: Sequence[LayerGains | None] = gains or (None,) * count
        keys = tuple(
            _key_parts(shape, k_groups, width, pairs, layer)
            for width, layer in zip(widths, by_layer, strict=True)
        )
    return tuple(LayerLayout(v, *k) for v, k in zip(values, keys, strict=True))


def divisors(number: int) -> list[int]:
    """Return the divisors of a number of heads, ascending."""
    return [n for n in range(1, number + 1) if number % n == 0]


def _required(gains: Gains | None, request: Request) -> Gains:
    if gains is None:
        wanted = "a kv_budget" if request.kv_budget is not None else "allocation over layers"
        raise _without_gains(wanted)
    return gains


def _without_gains(wanted: str) -> PlanError:
    return PlanError(
        [f"{wanted} needs calibrated gains"], "plan_for(shape, request, start, gains(...))"
    )


def _spread(curves: Sequence[Curve], budget: int, groups: int, name: str) -> tuple[int, ...]:
    """Spend one side's numbers over all layers, and return each layer's width."""
    if sum(curve.sizes[0] for curve in curves) > budget:
        raise PlanError([f"{name} is too narrow to differ by layer"], "try a wider one")
    chosen = allocate(curves, budget)
    return tuple(curve.sizes[i] // groups for curve, i in zip(curves, chosen, strict=True))


def _pairs(shape: ModelShape, request: Request, groups: int) -> int | None:
    """Return how many rotary pairs of each latent a request settles, None if gains choose."""
    if shape.rotary_dim == shape.head_dim:
        return None
    if request.k_rotary_dim is not None:
        return request.k_rotary_dim // (2 * groups)
    whole = shape.kv_heads * shape.rotary_dim
    settled = groups == shape.kv_heads and (request.k_dim or 0) >= whole
    return shape.rotary_dim // 2 if settled else None


def _key_parts(
    shape: ModelShape, groups: int, width: int, pairs: int | None, gains: LayerGains | None
) -> tuple[NopePart, RotaryPart]:
    """Return both parts of K for latents of one width.

    Args:
        shape: of the base.
        groups: latents of K.
        width: of each.
        pairs: rotary pairs of each, None to let gains choose.
        gains: of the layer, None where they are not needed.
    """
    full = shape.full_layout()
    if groups == shape.kv_heads and width == shape.head_dim:
        return full.k_nope, full.k_rotary
    if shape.rotary_dim == shape.head_dim:
        nope = NopePart(groups, width, maps="per_head", after_rope=True)
        return nope, RotaryPart(groups, 0, maps="per_head")
    kept = _frequencies(shape, groups, width, pairs, gains)
    rotary = RotaryPart(groups, 2 * len(kept), frequencies=kept)
    return NopePart(groups, width - rotary.width), rotary


def _frequencies(
    shape: ModelShape, groups: int, width: int, pairs: int | None, gains: LayerGains | None
) -> tuple[int, ...]:
    """Return the base frequency of each rotary pair that a latent keeps."""
    count = shape.rotary_dim // 2
    heads = shape.kv_heads // groups
    if width == heads * shape.head_dim:
        pairs = count * heads
    if gains is not None and pairs not in (0, count * heads):
        return Keys(gains, groups).best(width, pairs).frequencies
    if pairs is None or (count and pairs % count):
        raise _without_gains("the choice of rotary frequencies")
    each = pairs // count if count else 0
    return tuple(index for index in range(count) for _ in range(each))


def _budgeted(shape: ModelShape, request: Request, gains: Gains) -> tuple[LayerLayout, ...]:
    """Return the layouts that lose least within a budget, whatever their groups."""
    whole = 2 * shape.layers * shape.kv_dim
    budget = int((request.kv_budget or 0) * whole + 1e-9)
    best: Widths | None = None
    for found in _candidates(shape, request, gains, budget):
        if best is None or _better(found, best):
            best = found
    if best is None:
        raise PlanError(
            [f"kv_budget {request.kv_budget:g} leaves {budget} numbers per token: too few"],
            "try a larger one, or --groups 1",
        )
    layers = []
    for v, k, layer in zip(best.v, best.k, gains, strict=True):
        keys = _key_parts(shape, best.k_groups, k, None, layer)
        layers.append(LayerLayout(Part(best.v_groups, v), *keys))
    return tuple(layers)


def _spent_on_bits(shape: ModelShape, request: Request, gains: Gains) -> tuple[LayerLayout, ...]:
    """Return the layouts of any groups, widths and bits that lose least within a budget."""
    whole = 2 * shape.layers * shape.kv_dim * NUMBER_BITS
    counts = divisors(shape.kv_heads)[::-1]
    sinks, window = exact_tokens(request)
    choices = Choices(
        v_groups=[request.v_groups] if request.v_groups else counts,
        k_groups=[request.k_groups] if request.k_groups else counts,
        v_bits=request.v_choices,
        k_bits=request.k_choices,
        k_rotary_bits=request.k_rotary_choices,
        by_layer=request.by_layer,
        sinks=sinks,
        window=window,
    )
    size = 8 * int((request.kv_budget or 0) * whole / 8 + 1e-9)  # whole bytes
    found = spend(shape, gains, size, choices)
    if found is None:
        raise PlanError(
            [f"kv_budget {request.kv_budget:g} is too few bytes for these bits"],
            "try a larger one, --groups 1, or --bits auto",
        )
    return found.layers


def _better(found: Widths, best: Widths) -> bool:
    """Say whether widths are better; those with more latents came first and win ties."""
    if found.common != best.common:
        return found.common
    return found.loss < best.loss - 1e-9 * abs(best.loss) - 1e-12


def _candidates(shape: ModelShape, request: Request, gains: Gains, budget: int) -> Iterator[Widths]:
    """Yield the best widths for every admissible number of groups, many latents first."""
    counts = divisors(shape.kv_heads)[::-1]
    v_counts = [request.v_groups] if request.v_groups else counts
    k_counts = [request.k_groups] if request.k_groups else counts
    values = {g: [value_curve(layer, g) for layer in gains] for g in v_counts}
    keys = {g: [key_curve(layer, g) for layer in gains] for g in k_counts}
    for v_groups, k_groups in itertools.product(v_counts, k_counts):
        if max(v_groups, k_groups) % min(v_groups, k_groups):
            continue
        if request.target == VLLM:
            found = v_groups == k_groups and _equal(
                values[v_groups], keys[k_groups], v_groups, budget
            )
        elif request.by_layer:
            found = _free(values[v_groups], keys[k_groups], v_groups, k_groups, budget)
        else:
            found = _uniform(values[v_groups], keys[k_groups], v_groups, k_groups, budget)
        if found:
            yield found


def _free(
    values: list[Curve], keys: list[Curve], v_groups: int, k_groups: int, budget: int
) -> Widths | None:
    """Widths that differ by layer and side."""
    curves = [*values, *keys]
    if sum(curve.sizes[0] for curve in curves) > budget:
        return None
    chosen = allocate(curves, budget)
    sizes = [curve.sizes[i] for curve, i in zip(curves, chosen, strict=True)]
    loss = sum(curve.losses[i] for curve, i in zip(curves, chosen, strict=True))
    v = tuple(size // v_groups for size in sizes[: len(values)])
    k = tuple(size // k_groups for size in sizes[len(values) :])
    return Widths(v_groups, k_groups, v, k, loss)


def _uniform(
    values: list[Curve], keys: list[Curve], v_groups: int, k_groups: int, budget: int
) -> Widths | None:
    """One width of V and one of K for all layers."""
    count = len(values)
    found = _free([total(values)], [total(keys)], v_groups * count, k_groups * count, budget)
    return found and replace(
        found, v_groups=v_groups, k_groups=k_groups, v=found.v * count, k=found.k * count
    )


def _equal(values: list[Curve], keys: list[Curve], groups: int, budget: int) -> Widths | None:
    """One width for both sides of all layers, if possible one that vLLM's main backend takes."""
    count, both = len(values), total([total(values), total(keys)])
    fitting = []
    for size, loss in zip(both.sizes, both.losses, strict=True):
        width = size // (2 * groups * count)
        if size <= budget:
            fitting.append((not serving.common(width), loss, width))
    if not fitting:
        return None
    rare, loss, width = min(fitting)
    return Widths(groups, groups, (width,) * count, (width,) * count, loss, common=not rare)
