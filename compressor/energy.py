"""How much of keys and values latents keep: the share of what would be lost without them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
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
        latent: which of them, None for all together at one width.
        widths: of one latent, ascending.
        kept: shares in [0, 1], one for each width.
    """

    layer: int
    side: str
    groups: int
    latent: int | None
    widths: tuple[int, ...]
    kept: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def energies(gains: Sequence[LayerGains]) -> tuple[Energy, ...]:
    """Return what every layer, side and number of groups keeps, layer by layer."""
    return tuple(
        energy for layer, gain in enumerate(gains) for energy in _energies(gain, layer, None)
    )


def latent_energies(gains: Sequence[Sequence[LayerGains]]) -> tuple[Energy, ...]:
    """Return what every single latent keeps, layer by layer.

    Args:
        gains: of each latent of each layer.
    """
    return tuple(
        energy
        for layer, latents in enumerate(gains)
        for latent, gain in enumerate(latents)
        for energy in _energies(gain, layer, latent)
    )


def _energies(gain: LayerGains, layer: int, latent: int | None) -> Iterator[Energy]:
    for groups, losses in sorted(gain.v.items(), reverse=True):
        allowed = widths(len(losses) - 1)
        kept = _shares([losses[width] for width in allowed], losses[0])
        yield Energy(layer, V, groups, latent, allowed, kept)
    for groups in sorted(gain.k_nope, reverse=True):
        keys = Keys(gain, groups)
        allowed = widths(keys.full)
        kept = _shares([keys.best(width).loss for width in allowed], keys.best(0).loss)
        yield Energy(layer, K, groups, latent, allowed, kept)


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
