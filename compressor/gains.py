"""What latents of each width leave out, measured in the loss: the unit of one budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vdcompress.errors import UsageError

if TYPE_CHECKING:
    from vdcompress.load import Base
    from vdcompress.plan import Start
    from vdcompress.statistics import Statistics


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
    base: Base,  # noqa: ARG001
    statistics: Statistics,  # noqa: ARG001
    start: Start,  # noqa: ARG001
    groups: Sequence[int] | None = None,  # noqa: ARG001
) -> tuple[LayerGains, ...]:
    """Return what each layer's latents leave out at every width.

    Args:
        base: the loaded model.
        statistics: of all sides.
        start: how the new weights are found.
        groups: numbers of latents to look at; None is every divisor of the key/value heads.

    Raises:
        UsageError: the statistics lack a side.
    """
    raise UsageError("gains are not measured yet")
