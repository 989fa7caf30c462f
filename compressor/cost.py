"""What attention costs with a layout: weights, arithmetic for a token, arithmetic for the cache.

Counted are the projections with their maps and the two products of attention; a multiplication
with its addition is two operations. Biases, norms and softmax are left out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from vdcompress.modeling.layout import TYPICAL_TOKENS, LayerLayout

if TYPE_CHECKING:
    from vdcompress.plan import ModelShape, Plan


@dataclass(frozen=True)
class Cost:
    """The cost of attention, of a layer or of all.

    Attributes:
        q: weights of the query's side, ``q_expand`` included.
        k: weights of the key's side, ``k_compress`` included.
        v: weights of ``v_compress``.
        o: weights of the output's side, ``o_contract`` included.
        flops_per_cached_token: of one decoded token, for each token in the cache.
        bytes_per_cached_token: read for it, of 16 bit or packed.
    """

    q: int
    k: int
    v: int
    o: int
    flops_per_cached_token: int
    bytes_per_cached_token: int

    @property
    def weights(self) -> int:
        """All weights."""
        return self.q + self.k + self.v + self.o

    @property
    def flops_per_token(self) -> int:
        """Operations of the projections and maps, for each new token."""
        return 2 * self.weights

    def __add__(self, other: Cost) -> Cost:
        """Return the cost of both."""
        return Cost(*(a + b for a, b in zip(_values(self), _values(other), strict=True)))

    def to_json(self) -> dict[str, int]:
        """Return plain values."""
        return {
            "weights": self.weights,
            "flops_per_token": self.flops_per_token,
            "flops_per_cached_token": self.flops_per_cached_token,
            "bytes_per_cached_token": self.bytes_per_cached_token,
        }


def layer_cost(layer: LayerLayout, shape: ModelShape) -> Cost:
    """Return the cost of one layer.

    Args:
        layer: its layout; each side is folded or has maps per head.
        shape: of the base.
    """
    heads, d, hidden = shape.heads, shape.head_dim, shape.hidden
    k, v = layer.k_head_dim, layer.v_head_dim
    per_head = layer.k_maps == "per_head"
    keys = hidden * layer.k_dim
    if layer.k_nope.after_rope:
        joined = shape.kv_dim // layer.k_groups
        keys = hidden * shape.kv_dim + layer.k_groups * joined * k
    contracts = layer.v.maps == "per_head"
    stored = sum(part.cache_bytes(TYPICAL_TOKENS) for part in layer.parts)
    return Cost(
        q=heads * (hidden * d + d * k) if per_head else heads * hidden * k,
        k=keys,
        v=hidden * layer.v_dim,
        o=heads * (v * d + d * hidden) if contracts else heads * v * hidden,
        flops_per_cached_token=2 * heads * (k + v),
        bytes_per_cached_token=-(-stored // TYPICAL_TOKENS),
    )


def plan_cost(plan: Plan) -> Cost:
    """Return the cost of all layers of a plan."""
    return _total([layer_cost(layer, plan.shape) for layer in plan.layers])


def base_cost(shape: ModelShape) -> Cost:
    """Return the cost of the model before compression."""
    return _total([layer_cost(shape.full_layout(), shape)] * shape.layers)


def with_maps(layer: LayerLayout, maps: str) -> LayerLayout:
    """Return a layout whose maps are ``folded`` or ``per_head``, where that may be chosen."""
    values = replace(layer.v, maps=maps)
    if layer.k_nope.after_rope or not layer.k_nope.width:
        return replace(layer, v=values)
    nope, rotary = replace(layer.k_nope, maps=maps), replace(layer.k_rotary, maps=maps)
    return LayerLayout(values, nope, rotary)


def with_cheaper_maps(layer: LayerLayout, shape: ModelShape) -> LayerLayout:
    """Return a layout whose maps of each side are folded where that takes fewer weights.

    Weights of a projection are arithmetic for each new token too, so one choice serves both.
    """
    folded, per_head = with_maps(layer, "folded"), with_maps(layer, "per_head")
    costs = layer_cost(folded, shape), layer_cost(per_head, shape)
    values = folded.v if costs[0].o <= costs[1].o else per_head.v
    keys = folded if costs[0].q <= costs[1].q else per_head
    return LayerLayout(values, keys.k_nope, keys.k_rotary)


def _total(costs: list[Cost]) -> Cost:
    found = costs[0]
    for cost in costs[1:]:
        found = found + cost
    return found


def _values(cost: Cost) -> tuple[int, ...]:
    return (
        cost.q,
        cost.k,
        cost.v,
        cost.o,
        cost.flops_per_cached_token,
        cost.bytes_per_cached_token,
    )
