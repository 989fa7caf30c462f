"""The cache of a compressed model: pre-allocated latents that grow in steps.

The stock cache concatenates everything it holds at each token; here a new token is written into
room that is already there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from .room import Room


def require_inference(*new: Tensor) -> None:
    """Raise ``RuntimeError`` where a gradient would have to flow through a cache."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in new):
        raise RuntimeError("this cache is for inference: call the model under torch.no_grad()")


class GrowingLayer(DynamicLayer):
    """One layer's latents.

    ``keys`` [b, g, tokens, k] and ``values`` [b, g', tokens, v] are views of what is stored; the
    room behind them is at most 1.25 times as large plus one block of 64 tokens.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._rooms = (Room(), Room())

    def update(
        self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write new latents [b, g, new, width] behind the stored ones and return all of them."""
        require_inference(key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        for room, new in zip(self.rooms, (key_states, value_states), strict=True):
            room.append(new)
        self._show()
        keys, values = self._shown()
        return keys, values

    @property
    def rooms(self) -> tuple[Room, Room]:
        """Of keys and of values, with as many tokens as are shown."""
        if not self._rooms[0].is_empty:
            for room in self._rooms:
                room.crop(self.get_seq_length())
        return self._rooms

    def advance(self) -> None:
        """Take in a token that was written into the rooms behind those stored."""
        for room in self._rooms:
            room.length += 1
        self._show()

    def _show(self) -> None:
        self.keys, self.values = (room.shown for room in self._rooms)

    def _change_rooms(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply ``change`` to both rooms and show as many tokens as before."""
        if self._rooms[0].is_empty:
            return
        for room in self.rooms:
            room.change(change)
        self._show()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the batch for beam search."""
        self._change_rooms(lambda room: room.index_select(0, beam_idx.to(room.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence ``repeats`` times."""
        self._change_rooms(lambda room: room.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences at ``indices``."""
        self._change_rooms(lambda room: room[indices, ...])

    def offload(self) -> None:
        """Move the latents to the CPU."""
        self._change_rooms(lambda room: room.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Move the latents back to the layer's device."""
        self._change_rooms(lambda room: room.to(self.device, non_blocking=True))

    def reset(self) -> None:
        """Forget everything, the room included."""
        self._rooms = (Room(), Room())
        self.keys = self.values = None
        self.is_initialized = False

    def nbytes(self) -> int:
        """Bytes of the stored latents."""
        return sum(x.numel() * x.element_size() for x in self._shown())

    def nbytes_allocated(self) -> int:
        """Bytes of the room."""
        return sum(room.nbytes_allocated() for room in self._rooms)

    def _shown(self) -> tuple[Tensor, ...]:
        stored = (self.keys, self.values)
        return () if self._rooms[0].is_empty else tuple(x for x in stored if x is not None)


class LatentCache(DynamicCache):
    """The latents of all layers.

    Args:
        layers: of the cache, or how many of them for a :class:`GrowingLayer` each.
        offloading: keep them on the CPU while other layers run.
    """

    def __init__(self, layers: int | Iterable[Any], offloading: bool = False) -> None:
        super().__init__(offloading=offloading)
        self.layer_class_to_replicate = None
        if isinstance(layers, int):
            layers = (GrowingLayer() for _ in range(layers))
        self.layers: list[Any] = list(layers)

    def nbytes(self) -> int:
        """Bytes of the latents stored, over all layers and sequences."""
        return sum(layer.nbytes() for layer in self.layers)

    def nbytes_allocated(self) -> int:
        """Bytes allocated, over all layers and sequences."""
        return sum(layer.nbytes_allocated() for layer in self.layers)
