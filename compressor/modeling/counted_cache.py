"""A cache as a CUDA graph writes and reads it: places and counts are numbers on the device.

It wraps a cache that holds its prompt, and knows the step in which each part stores one token, in
16 bits or aged out of the window and packed. What it does depends on nothing that changes but
:class:`StepCounts`, so it may be done again; the cache itself is told afterwards.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from .cache import GrowingLayer, LatentCache
from .packed_cache import PackedLayer, PackedPart
from .packed_latents import Ageing, Counted, PackedLatents, StoredPart
from .packed_rooms import PackedRooms
from .room import Room
from .step_counts import Place, StepCounts, common

AHEAD = 64  # tokens for which rooms that are nearly full move together, so that it is seldom


@dataclass(frozen=True)
class ExactPart:
    """A part in 16 bits."""

    room: Room

    def place(self) -> Place | None:
        """Return where the next token goes; None where that is not a matter of numbers alone."""
        return None if self.room.is_empty else Place(token=self.room.length)

    def has_room(self) -> bool:
        """Whether there is room for one more token."""
        return self.room.length < self.room.whole.shape[2]

    def make_room(self) -> None:
        """Have room for one more token."""
        self.room.reserve(self.room.length + 1, AHEAD)

    def held(self) -> tuple[Tensor, ...]:
        """Return all memory."""
        return (self.room.whole,)

    def write(self, new: Tensor, counts: StepCounts) -> None:
        """Store a token [b, g, 1, width] in its place."""
        self.room.whole.index_copy_(2, counts.at("token"), new)

    def stored(self) -> StoredPart:
        """Return what the query behind the next token reads; tensors are all memory there is."""
        whole = self.room.whole
        nothing = whole[:, :, :0]
        return StoredPart(whole.shape[3], Ageing(0), nothing, None, 0, whole, 0, None)


@dataclass(frozen=True)
class AgeingPart:
    """A part of which a token is packed whenever one comes.

    Attributes:
        part: the whole of it.
        rooms: of its packed tokens.
    """

    part: PackedPart
    rooms: PackedRooms

    def place(self) -> Place | None:
        """Return where the next token goes, and which one is packed then."""
        part, ageing = self.part, self.part.ageing
        packed = ageing.packed_stop(part.tokens) - ageing.sinks
        if ageing.token_block != 1 or not packed:
            return None
        if not part.recent.keep:
            return Place(source=0, packed=packed)
        behind = part.recent.used
        return Place(recent=behind, source=behind - ageing.window, packed=packed)

    def has_room(self) -> bool:
        """Whether there is room for one more token, new and packed."""
        codes = self.rooms.codes
        return codes.length < codes.whole.shape[2] and self.part.recent.has_room

    def make_room(self) -> None:
        """Have room for one more token."""
        self.rooms.reserve(self.rooms.codes.length + 1, AHEAD)
        self.part.recent.make_room()

    def held(self) -> tuple[Tensor, ...]:
        """Return all memory."""
        part = self.part
        rooms = (*self.rooms.rooms, part.sinks)
        tensors = tuple(room.whole for room in rooms if not room.is_empty)
        return (*tensors, part.recent.whole) if part.recent.keep else tensors

    def write(self, new: Tensor, counts: StepCounts) -> None:
        """Store a token [b, g, 1, width], and pack the one whose time has come."""
        source = new
        if self.part.recent.keep:
            source = self.part.recent.whole
            source.index_copy_(2, counts.at("recent"), new)
        self.rooms.write(source[:, :, :1], counts.at("source", 2))

    def stored(self) -> StoredPart:
        """Return what the query behind the next token reads."""
        part = self.part
        tokens, nothing = part.tokens + 1, part.sinks.whole[:, :, :0]
        exact, start = nothing, tokens
        if part.recent.keep:
            exact, start = part.recent.whole, part.recent.first_of_whole
        return StoredPart(
            part.part.width,
            part.ageing,
            part.sinks.shown,
            self.rooms.whole,
            part.ageing.packed_stop(tokens),
            exact,
            start,
            part.quantizer,
        )


Part = ExactPart | AgeingPart


def _part(part: PackedPart) -> Part:
    return ExactPart(part.exact) if part.packed is None else AgeingPart(part, part.packed)


class CountedLayer(CacheLayerMixin):
    """One layer of a :class:`CountedCache`.

    Args:
        layer: that holds the tokens.
        counts: of the step.
    """

    is_sliding = False

    def __init__(self, layer: GrowingLayer | PackedLayer, counts: StepCounts) -> None:
        super().__init__()
        self.layer, self.counts = layer, counts

    @property
    def parts(self) -> list[Part]:
        """All parts as they are now, the values last."""
        if isinstance(self.layer, PackedLayer):
            return [_part(part) for part in self.layer.parts]
        return [ExactPart(room) for room in self.layer.rooms]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: there are tokens."""

    def update(  # type: ignore[override]
        self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[PackedLatents, PackedLatents]:
        """Write one token's latents [b, g, 1, width] and return what attention reads."""
        parts = self.parts
        widths = [part.stored().width for part in parts[:-1]]
        new = (*key_states.split(widths, dim=-1), value_states)
        for part, x in zip(parts, new, strict=True):
            part.write(x, self.counts)
        return self.stored()

    def stored(self) -> tuple[PackedLatents, PackedLatents]:
        """Return the keys and values that the next token's query reads."""
        tokens, counted = self.get_seq_length() + 1, Counted(self.counts, self.stored)
        *keys, value = (part.stored() for part in self.parts)
        return (
            PackedLatents(tuple(keys), tokens, counted),
            PackedLatents((value,), tokens, counted),
        )

    def get_seq_length(self) -> int:
        """Tokens stored."""
        return int(self.layer.get_seq_length())

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many tokens a mask spans, and its offset."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """There is no most."""
        return -1


class CountedCache(LatentCache):
    """What a model is given in place of a cache while a graph is captured.

    Args:
        cache: with a prompt in it.

    Attributes:
        moves: how often memory was found to be another, the first time too.
    """

    def __init__(self, cache: LatentCache) -> None:
        device = cache.layers[0].device
        self.counts = StepCounts(len(cache.layers), device)
        super().__init__([CountedLayer(layer, self.counts) for layer in cache.layers])
        kinds = {
            type(part): (layer, index)
            for layer in self.layers
            for index, part in enumerate(layer.parts)
        }
        self._kinds = list(kinds.values())
        self._memory: tuple[Tensor, ...] = ()
        self._witnessed: tuple[Tensor, ...] = ()
        self.moves = 0

    @property
    def parts(self) -> Sequence[Part]:
        """All parts of all layers."""
        return [part for layer in self.layers for part in layer.parts]

    def make_room(self) -> Place | None:
        """Have room for a token everywhere, and return its place.

        None where it is not said by numbers alone, or not the same for all parts.
        """
        if any(part.place() is None for part in self.parts):
            return None
        for part in self.parts:
            part.make_room()
        held = _held(self.parts)
        self.moves += not _same(held, self._memory)
        self._memory, self._witnessed = held, _held(self._witnesses())
        return common(part.place() for part in self.parts)

    def place(self) -> Place | None:
        """Return where the next token goes, None where :meth:`make_room` has to be called.

        That is where there is no room, or where somebody has put other memory in the cache. All
        layers store tokens alike, so one part of each kind is asked.
        """
        parts = self._witnesses()
        places = [part.place() for part in parts]
        if None in places or not all(part.has_room() for part in parts):
            return None
        if not _same(_held(parts), self._witnessed):
            return None
        return common(place for place in places if place is not None)

    def _witnesses(self) -> list[Part]:
        """Return one part of each kind."""
        return [layer.parts[index] for layer, index in self._kinds]

    def advance(self) -> None:
        """Tell the cache that a token was stored."""
        for layer in self.layers:
            layer.layer.advance()


def _held(parts: Sequence[Part]) -> tuple[Tensor, ...]:
    return tuple(x for part in parts for x in part.held())


def _same(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return len(some) == len(others) and all(map(operator.is_, some, others))
