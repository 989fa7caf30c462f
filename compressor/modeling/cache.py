"""The cache of a compressed model: pre-allocated latents that grow in steps.

The stock cache concatenates everything it holds at each token; here a new token is written into
room that is already there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

BLOCK = 64
GROWTH = 1.25


class GrowingLayer(DynamicLayer):
    """One layer's latents.

    ``keys`` [b, g, tokens, k] and ``values`` [b, g', tokens, v] are views of what is stored; the
    room behind them is at most 1.25 times as large plus one block of 64 tokens.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._rooms: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write new latents [b, g, new, width] behind the stored ones and return all of them."""
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            raise RuntimeError("this cache is for inference: call the model under torch.no_grad()")
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        stop = start + key_states.shape[-2]
        self._make_room(key_states, value_states, start, stop)
        for room, new in zip(self._rooms or (), (key_states, value_states), strict=True):
            room[:, :, start:stop] = new
        self._show(stop)
        keys, values = self._shown()
        return keys, values

    def _make_room(self, keys: Tensor, values: Tensor, start: int, stop: int) -> None:
        """Move to larger rooms if ``stop`` tokens do not fit."""
        if self._rooms is not None and self._rooms[0].shape[-2] >= stop:
            return
        blocks = -(-int(stop * GROWTH) // BLOCK) if start else -(-stop // BLOCK)
        old = self._rooms
        rooms = []
        for side, new in enumerate((keys, values)):
            room = new.new_empty(*new.shape[:2], blocks * BLOCK, new.shape[-1])
            if old is not None:
                room[:, :, :start] = old[side][:, :, :start]
            rooms.append(room)
        self._rooms = (rooms[0], rooms[1])

    def _show(self, tokens: int) -> None:
        if self._rooms is not None:
            self.keys, self.values = (room[:, :, :tokens] for room in self._rooms)

    def _change_rooms(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply ``change`` to both rooms and show as many tokens as before."""
        if self._rooms is not None:
            tokens = self.get_seq_length()
            self._rooms = (change(self._rooms[0]), change(self._rooms[1]))
            self._show(tokens)

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
        self._rooms = self.keys = self.values = None
        self.is_initialized = False

    def nbytes(self) -> int:
        """Bytes of the stored latents."""
        return sum(x.numel() * x.element_size() for x in self._shown())

    def nbytes_allocated(self) -> int:
        """Bytes of the room."""
        return sum(x.numel() * x.element_size() for x in self._rooms or ())

    def _shown(self) -> tuple[Tensor, ...]:
        stored = (self.keys, self.values)
        return () if self._rooms is None else tuple(x for x in stored if x is not None)


class LatentCache(DynamicCache):
    """One :class:`GrowingLayer` for each layer of the model."""

    def __init__(self, layers: int, offloading: bool = False) -> None:
        super().__init__(offloading=offloading)
        self.layer_class_to_replicate = None
        self.layers: list[Any] = [GrowingLayer() for _ in range(layers)]

    def nbytes(self) -> int:
        """Bytes of the latents stored, over all layers and sequences."""
        return sum(layer.nbytes() for layer in self.layers)

    def nbytes_allocated(self) -> int:
        """Bytes allocated, over all layers and sequences."""
        return sum(layer.nbytes_allocated() for layer in self.layers)
