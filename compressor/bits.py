"""The bits of a layer's latents: as a request asks for them, what they cost and what they lose."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, TypeVar

from vdcompress.modeling.layout import TYPICAL_TOKENS, LayerLayout, NopePart, Part, RotaryPart
from vdcompress.modeling.schemes import DEFAULTS, ROTARY_DEFAULTS, SCHEMES
from vdcompress.request import AUTO, NUMBER_BITS

if TYPE_CHECKING:
    from vdcompress.plan import ModelShape
    from vdcompress.request import Request

SINKS, WINDOW = 4, 64  # below 8 bits, where few exact tokens are worth far more than their bytes
BUDGET_WINDOW = 16  # where a budget chooses bits and pays for it: best of 0, 16 and 64
SEED, SAMPLE = 0, 4096  # numbers that a quantiser's error is measured on
AnyPart = TypeVar("AnyPart", bound=Part)


def with_bits(layer: LayerLayout, request: Request, shape: ModelShape) -> LayerLayout:
    """Return a layout whose latents have the bits that a request asks for.

    Whole keys that RoPE rotates wholly are mapped behind it, where they can be rotated once more.

    Args:
        layer: with 16 bits everywhere.
        request: what is asked.
        shape: of the base.
    """
    (v_bits,), (k_bits,), (rotary_bits,) = (
        request.v_choices,
        request.k_choices,
        request.k_rotary_choices,
    )
    if k_bits < NUMBER_BITS and shape.rotary_dim == shape.head_dim and layer.k_rotary.width:
        layer = behind_rope(layer)
    return LayerLayout(
        packed(layer.v, v_bits),
        packed(layer.k_nope, k_bits),
        packed(layer.k_rotary, rotary_bits, ROTARY_DEFAULTS),
    )


def exact_tokens(request: Request) -> tuple[int, int]:
    """Return how many sinks and how many of the newest tokens stay exact.

    A budget that chooses bits pays for them.
    """
    choices = (request.v_choices, request.k_choices, request.k_rotary_choices)
    few = min(bits for found in choices for bits in found) < 8
    sinks, window = (SINKS, WINDOW) if few else (0, 0)
    if request.bits == AUTO:
        window = min(window, BUDGET_WINDOW)
    return (
        sinks if request.sinks is None else request.sinks,
        window if request.window is None else request.window,
    )


def packed(part: AnyPart, bits: int, defaults: Mapping[int, str] = DEFAULTS) -> AnyPart:
    """Return a part in so many bits, by the quantiser that is best there."""
    if bits == NUMBER_BITS or not part.width:
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


def bits_per_token(part: Part, sinks: int = 0, window: int = 0) -> int:
    """Return the bits of a part's numbers, scales and zero points, over 2048 tokens, rounded up.

    Args:
        part: its layout.
        sinks: first tokens that stay exact.
        window: newest tokens that stay exact.
    """
    size = part.cache_bytes(TYPICAL_TOKENS, sinks=sinks, window=window)
    return -(-8 * size // TYPICAL_TOKENS)


def relative_error(part: Part) -> float:
    """Return the variance of a packed part's error by that of its numbers; 0 where not packed."""
    if not part.packed:
        return 0.0
    scheme = SCHEMES[part.quantizer or ""]
    return _measured_error(scheme.name, part.bits, part.width // scheme.blocks(part.width))


@cache
def _measured_error(name: str, bits: int, block: int) -> float:
    """Round normal numbers, a block to a scale, and return the relative mean square error."""
    import torch

    from vdcompress.modeling.quantizers import quantizer

    numbers = torch.randn(SAMPLE, block, generator=torch.Generator().manual_seed(SEED))
    error = quantizer(name, bits).read_back(numbers) - numbers
    return float(error.double().square().mean() / numbers.double().square().mean())
