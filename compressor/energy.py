"""How much of keys and values latents keep: the share of what would be lost without them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vdcompress.allocate import Keys, widths

if TYPE_CHECKING:
    from vdcompress.gains import LayerGains

V, K = "v", "k"


@dataclass(frozen=True)
class Energy:
    """What latents of one side of one layer keep at each width, 1 being everything.

    The metric is that of the gains: directions count by what the loss loses without them. K is
    split between rotary and other dimensions at its best.

    Attributes:
        layer: its number.
        side: ``v`` or ``k``.
        groups: latents.
        widths: of one latent, ascending.
        kept: shares in [0, 1], one for each width.
    """

    layer: int
    side: str
    groups: int
    widths: tuple[int, ...]
    kept: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        head = {"layer": self.layer, "side": self.side, "groups": self.groups}
        return head | {"widths": list(self.widths), "kept": list(self.kept)}


def energies(gains: Sequence[LayerGains]) -> tuple[Energy, ...]:
    """Return what every layer, side and number of groups keeps, layer by layer."""
    found = []
    for layer, gain in enumerate(gains):
        for groups, losses in sorted(gain.v.items(), reverse=True):
            allowed = widths(len(losses) - 1)
            kept = _shares([losses[width] for width in allowed], losses[0])
            found.append(Energy(layer, V, groups, allowed, kept))
        for groups in sorted(gain.k_nope, reverse=True):
            keys = Keys(gain, groups)
            allowed = widths(keys.full)
            kept = _shares([keys.best(width).loss for width in allowed], keys.best(0).loss)
            found.append(Energy(layer, K, groups, allowed, kept))
    return tuple(found)


def frequency_shares(gains: Sequence[LayerGains]) -> tuple[tuple[float, ...], ...]:
    """Return which share of K's rotary energy each frequency holds, layer by layer.

    Empty rows for families that rotate whole heads: their keys are narrowed behind RoPE.
    """
    found = []
    for gain in gains:
        curves = gain.k_rotary.get(max(gain.k_nope), ())
        total = sum(curve[0] for curve in curves)
        found.append(tuple(curve[0] / total if total else 0.0 for curve in curves))
    return tuple(found)


def _shares(losses: Sequence[float], nothing_kept: float) -> tuple[float, ...]:
    if nothing_kept <= 0:
        return (1.0,) * len(losses)
    return tuple(min(1.0, max(0.0, 1 - loss / nothing_kept)) for loss in losses)
