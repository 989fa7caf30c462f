"""Give a layer's latents the bits that a request asks for, and what it leaves open."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from vdcompress.modeling.layout import LayerLayout, NopePart, Part, RotaryPart
from vdcompress.modeling.schemes import DEFAULTS, ROTARY_DEFAULTS

if TYPE_CHECKING:
    from vdcompress.plan import ModelShape
    from vdcompress.request import Request

ROTARY_BITS = 8
SINKS, WINDOW = 4, 32  # below 8 bits, where few exact tokens are worth far more than their bytes
AnyPart = TypeVar("AnyPart", bound=Part)


def with_bits(layer: LayerLayout, request: Request, shape: ModelShape) -> LayerLayout:
    """Return a layout whose latents have the bits that a request asks for.

    Whole keys that RoPE rotates wholly are mapped behind it, where they can be rotated once more.

    Args:
        layer: with 16 bits everywhere.
        request: what is asked.
        shape: of the base.
    """
    v_bits, k_bits = request.v_bits or 16, request.k_bits or 16
    if k_bits < 16 and shape.rotary_dim == shape.head_dim and layer.k_rotary.width:
        layer = behind_rope(layer)
    return LayerLayout(
        packed(layer.v, v_bits),
        packed(layer.k_nope, k_bits),
        packed(layer.k_rotary, rotary_bits(request), ROTARY_DEFAULTS),
    )


def exact_tokens(request: Request) -> tuple[int, int]:
    """Return how many sinks and how many of the newest tokens stay exact."""
    asked = (request.v_bits, request.k_bits, request.k_rotary_bits)
    few = any(bits is not None and bits < 8 for bits in asked)
    sinks, window = (SINKS, WINDOW) if few else (0, 0)
    return (
        sinks if request.sinks is None else request.sinks,
        window if request.window is None else request.window,
    )


def rotary_bits(request: Request) -> int:
    """Return the bits of rotary keys: asked for, or as many as K has and at least 8."""
    if request.k_rotary_bits is not None:
        return request.k_rotary_bits
    return max(request.k_bits or 16, ROTARY_BITS)


def packed(part: AnyPart, bits: int, defaults: Mapping[int, str] = DEFAULTS) -> AnyPart:
    """Return a part in so many bits, by the quantiser that is best there."""
    if bits == 16 or not part.width:
        return part
    return replace(part, bits=bits, quantizer=defaults[bits])


def behind_rope(layer: LayerLayout) -> LayerLayout:
    """Return a layout whose whole rotary keys go through a square map behind RoPE."""
    groups, width = layer.k_rotary.groups, layer.k_head_dim
    return replace(
        layer,
        k_nope=NopePart(groups, width, maps="per_head", after_rope=True),
        k_rotary=RotaryPart(groups, 0, maps="per_head"),
    )
