"""What a compressed layer keeps in its cache: the ``kv_layout`` of a config, layer by layer.

A layer's cache has three parts: ``v``, the keys that RoPE does not rotate (``k_nope``) and those
that it does (``k_rotary``). This file is pure Python: a plan, a config and an exported folder all
read the same definitions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from .schemes import QUANTIZED_BITS, SCHEMES

BITS = (16, *QUANTIZED_BITS)
MAPS = ("folded", "per_head")
TYPICAL_TOKENS = 2048  # for shares of a token that depend on the length of its sequence


@dataclass(frozen=True)
class Part:
    """One part of a layer's cache.

    Attributes:
        groups: how many latents the layer keeps; key/value heads of the base divide into them.
        width: numbers per latent and token.
        bits: 16 for unquantised, else 8, 4, 3 or 2.
        quantizer: name of the quantiser when ``bits`` is below 16.
        maps: ``folded`` when each head's map is part of its projection, ``per_head`` when it is a
            matrix of its own (``q_expand`` for keys, ``o_contract`` for values).
    """

    groups: int
    width: int
    bits: int = 16
    quantizer: str | None = None
    maps: str = "folded"

    @property
    def dim(self) -> int:
        """Numbers per token over all groups."""
        return self.groups * self.width

    @property
    def packed(self) -> bool:
        """Whether a quantiser packs this part."""
        return self.bits < 16 and self.width > 0

    def cache_bytes(
        self, tokens: int, *, number_bytes: int = 2, sinks: int = 0, window: int = 0
    ) -> int:
        """Return the exact bytes of this part over a sequence of so many tokens.

        Args:
            tokens: of the sequence.
            number_bytes: of a number that is not packed.
            sinks: first tokens that a quantiser leaves as they are.
            window: newest tokens that it leaves as they are.
        """
        if not self.packed:
            return tokens * self.dim * number_bytes
        latent = SCHEMES[self.quantizer or ""].stored_bytes(
            tokens,
            self.width,
            self.bits,
            number_bytes=number_bytes,
            sinks=sinks,
            window=window,
        )
        return self.groups * latent


@dataclass(frozen=True)
class NopePart(Part):
    """The unrotated keys; ``after_rope``: latents of whole keys, compressed behind RoPE."""

    after_rope: bool = False


@dataclass(frozen=True)
class RotaryPart(Part):
    """The rotated keys.

    Attributes:
        frequencies: for each kept pair the index of its base frequency (``config.inv_freq``), the
            same for every group; an index stands m times where m virtual heads keep it. A latent
            holds the first members of all pairs, then the second ones.
    """

    frequencies: tuple[int, ...] = ()


@dataclass(frozen=True)
class LayerLayout:
    """The three parts of one layer."""

    v: Part
    k_nope: NopePart
    k_rotary: RotaryPart

    @property
    def v_groups(self) -> int:
        """Latents of V per token."""
        return self.v.groups

    @property
    def k_groups(self) -> int:
        """Latents of K per token."""
        return self.k_nope.groups if self.k_nope.width else self.k_rotary.groups

    @property
    def k_maps(self) -> str:
        """Whether the query's map is folded, for both parts of K."""
        return self.k_nope.maps if self.k_nope.width else self.k_rotary.maps

    @property
    def v_head_dim(self) -> int:
        """Width of one V latent."""
        return self.v.width

    @property
    def k_head_dim(self) -> int:
        """Width of one K latent, rotated dimensions first."""
        return self.k_rotary.width + self.k_nope.width

    @property
    def v_dim(self) -> int:
        """Numbers of V per token."""
        return self.v.dim

    @property
    def k_dim(self) -> int:
        """Numbers of K per token."""
        return self.k_nope.dim + self.k_rotary.dim

    @property
    def parts(self) -> tuple[Part, ...]:
        """The parts in the order of their names."""
        return (self.v, self.k_nope, self.k_rotary)

    @property
    def packed(self) -> bool:
        """Whether a quantiser packs any part."""
        return any(part.packed for part in self.parts)

    def to_json(self) -> dict[str, Any]:
        """Return plain dictionaries, as they stand in ``config.json``."""
        data = asdict(self)
        data["k_rotary"]["frequencies"] = list(self.k_rotary.frequencies)
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> LayerLayout:
        """Read what :meth:`to_json` wrote; an unknown or missing field raises ``TypeError``."""
        rotary = dict(data["k_rotary"])
        rotary["frequencies"] = tuple(rotary.get("frequencies", ()))
        return cls(Part(**data["v"]), NopePart(**data["k_nope"]), RotaryPart(**rotary))


def problems(layout: LayerLayout, *, heads: int, kv_heads: int, frequencies: int) -> list[str]:
    """Say everything that makes a layout impossible; an empty list means it is sound.

    Args:
        layout: the layer's three parts.
        heads: query heads of the base.
        kv_heads: key/value heads of the base.
        frequencies: number of base frequencies.
    """
    found = []
    for name, part in zip(("v", "k_nope", "k_rotary"), layout.parts, strict=True):
        found += [f"{name}.{reason}" for reason in _part_problems(part, heads, kv_heads)]
    rotary = layout.k_rotary
    if rotary.width != 2 * len(rotary.frequencies):
        found.append(f"k_rotary.width {rotary.width} is not twice its number of frequencies")
    if any(not 0 <= index < frequencies for index in rotary.frequencies):
        found.append(f"k_rotary.frequencies go beyond the base's {frequencies}")
    if layout.v.width < 1 or layout.k_head_dim < 1:
        found.append("a latent has no dimensions")
    if layout.k_nope.width and rotary.width:
        if layout.k_nope.groups != rotary.groups:
            found.append("k_nope and k_rotary differ in groups, which no attention layer runs yet")
        if layout.k_nope.maps != rotary.maps:
            found.append("k_nope and k_rotary differ in maps")
    if layout.k_nope.after_rope and (rotary.width or layout.k_maps != "per_head"):
        found.append("keys compressed after RoPE have no rotary part and maps per head")
    more, fewer = max(layout.k_groups, layout.v_groups), min(layout.k_groups, layout.v_groups)
    if fewer > 0 and more % fewer:
        found.append(f"{more} groups on one side are not a multiple of {fewer} on the other")
    return found


def _part_problems(part: Part, heads: int, kv_heads: int) -> list[str]:
    found = []
    if part.groups < 1 or kv_heads % part.groups or heads % part.groups:
        found.append(f"groups {part.groups} does not divide {kv_heads} key/value heads")
    if part.width < 0:
        found.append(f"width {part.width} is below zero")
    if part.bits not in BITS:
        found.append(f"bits {part.bits} is none of {', '.join(map(str, BITS))}")
    elif part.bits < 16:
        found += _quantizer_problems(part)
    if part.maps not in MAPS:
        found.append(f"maps {part.maps!r} is none of {', '.join(MAPS)}")
    return found


def _quantizer_problems(part: Part) -> list[str]:
    scheme = SCHEMES.get(part.quantizer or "")
    if scheme is None:
        return [f"quantizer {part.quantizer!r} is none of {', '.join(SCHEMES)}"]
    if part.bits not in scheme.bits:
        return [f"quantizer {scheme.name} does not round to {part.bits} bits"]
    return []
