"""A cache of packed latents: what is written is rounded and packed, and read back from there.

Each part of a layer (rotary keys, other keys, values) has its own quantiser, or none. Sinks, the
window and tokens that do not fill a block stay in the model's dtype. What is stored depends on the
number of tokens alone, not on the chunks that they came in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from .cache import GrowingLayer, LatentCache, require_inference
from .layout import LayerLayout, Part
from .packed_latents import Ageing, PackedLatents, StoredPart
from .packed_rooms import PackedRooms
from .quantizers import quantizer
from .recent import Recent
from .room import Room

ROLLBACK = 32  # tokens that may be taken back without a trace


class PackedPart:
    """One part of a layer, stored.

    Args:
        part: its layout.
        sinks: first tokens that stay exact.
        window: newest tokens that stay exact.
    """

    def __init__(self, part: Part, sinks: int = 0, window: int = 0) -> None:
        self.part, self.tokens = part, 0
        self.quantizer = quantizer(part.quantizer or "", part.bits) if part.packed else None
        block = self.quantizer.scheme.token_block if self.quantizer else 0
        self.ageing = Ageing(block, sinks, window) if block else Ageing(0)
        self.sinks = Room(max(1, sinks))
        self.exact = Room()  # of a part that is not packed
        self.packed = PackedRooms(self.quantizer) if self.quantizer else None
        late = window + block - 1
        self.recent = Recent(late + ROLLBACK if late > 0 else 0)

    def append(self, new: Tensor) -> StoredPart:
        """Store new tokens [b, g, new, width] and return all that attention reads."""
        before, self.tokens = self.tokens, self.tokens + new.shape[2]
        if self.quantizer is None:
            self.exact.append(new)
            return self._stored(self.exact.shown, 0)
        missing = self.ageing.sinks - before
        if missing > 0 or self.sinks.is_empty:
            self.sinks.append(new[:, :, : max(0, missing)])
        at_hand, start = self.recent.extend(new)
        self._pack(at_hand, start, self.ageing.packed_stop(before))
        first = min(max(self.ageing.packed_stop(before + 1), start), self.tokens)
        return self._stored(at_hand[:, :, first - start :], first)

    def stored(self) -> StoredPart:
        """Return what the next query will read of the tokens stored so far."""
        if self.quantizer is None:
            return self._stored(self.exact.shown, 0)
        if self.recent.keep:
            return self._stored(*self.recent.view())
        return self._stored(self.sinks.shown[:, :, :0], self.tokens)

    def _pack(self, at_hand: Tensor, start: int, done: int) -> None:
        """Pack what is old enough of the tokens ``at_hand``, which begin at ``start``."""
        stop = self.ageing.packed_stop(self.tokens)
        if self.packed is not None and (stop > done or self.packed.is_empty):
            self.packed.append(at_hand[:, :, max(0, done - start) : max(0, stop - start)])

    def _stored(self, exact: Tensor, start: int) -> StoredPart:
        return StoredPart(
            width=self.part.width,
            ageing=self.ageing,
            sinks=exact[:, :, :0] if self.sinks.is_empty else self.sinks.shown,
            packed=None if self.packed is None else self.packed.shown,
            packed_stop=self.ageing.packed_stop(self.tokens),
            exact=exact,
            exact_start=start,
            quantizer=self.quantizer,
        )

    def crop(self, tokens: int) -> None:
        """Forget all but the first tokens.

        What becomes new again is exact as before if it was written in the last
        :data:`ROLLBACK` tokens, else it is what its packed form says.
        """
        if tokens >= self.tokens:
            return
        if self.packed is None:
            self.exact.crop(tokens)
        else:
            stop = self.ageing.packed_stop(tokens)
            needed, start = min(stop, tokens), min(self.recent.start, tokens)
            if self.recent.keep and needed < start:
                lost = self.stored().read(needed, start)
                self.recent.prepend(lost, needed)
            self.recent.crop(tokens)
            self.sinks.crop(tokens)
            self.packed.crop(stop - self.ageing.sinks)
        self.tokens = tokens

    def advance(self) -> None:
        """Take in a token that was written, and one that was packed, behind those stored."""
        self.tokens += 1
        if self.packed is None:
            self.exact.length += 1
        else:
            self.packed.advance()
            self.recent.advance()

    def change(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply ``change`` to every tensor; it may select or repeat sequences, or move them."""
        for held in self._held():
            held.change(change)

    def nbytes(self) -> int:
        """Bytes of what is stored; copies that only serve to take tokens back are not counted."""
        return self.exact_nbytes() + (0 if self.packed is None else self.packed.nbytes())

    def exact_nbytes(self) -> int:
        """Bytes of the numbers that are not packed, in the model's dtype."""
        late = self.tokens - self.ageing.packed_stop(self.tokens)
        recent = self.recent.nbytes_of(max(0, late)) if self.quantizer else 0
        return self.sinks.nbytes() + self.exact.nbytes() + recent

    def nbytes_allocated(self) -> int:
        """Bytes of the rooms, spare capacity included."""
        return sum(held.nbytes_allocated() for held in self._held())

    def _held(self) -> tuple[Room | PackedRooms | Recent, ...]:
        packed = () if self.packed is None else (self.packed,)
        return (self.sinks, self.exact, self.recent, *packed)


class PackedLayer(CacheLayerMixin):
    """One layer's packed latents.

    Args:
        layout: of the layer.
        sinks: first tokens that stay exact.
        window: newest tokens that stay exact.
    """

    is_croppable = True
    is_sliding = False

    def __init__(self, layout: LayerLayout, sinks: int = 0, window: int = 0) -> None:
        super().__init__()
        self.layout, self.exact_tokens = layout, (sinks, window)
        self._make_parts()

    def _make_parts(self) -> None:
        keys = [part for part in (self.layout.k_rotary, self.layout.k_nope) if part.width]
        self.key_parts = [PackedPart(part, *self.exact_tokens) for part in keys]
        self.value_part = PackedPart(self.layout.v, *self.exact_tokens)

    @property
    def parts(self) -> list[PackedPart]:
        """All parts."""
        return [*self.key_parts, self.value_part]

    def lazy_initialization(self, key_states: Tensor, _value_states: Tensor) -> None:
        """Remember the device and the dtype."""
        self.device, self.dtype, self.is_initialized = key_states.device, key_states.dtype, True

    def update(  # type: ignore[override]
        self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[PackedLatents, PackedLatents]:
        """Write new latents [b, g, new, width] and return what attention reads."""
        require_inference(key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        widths = [part.part.width for part in self.key_parts]
        new = key_states.split(widths, dim=-1)
        keys = [part.append(x) for part, x in zip(self.key_parts, new, strict=True)]
        return self._latents(keys, self.value_part.append(value_states))

    def stored(self) -> tuple[PackedLatents, PackedLatents]:
        """Return all latents stored so far."""
        return self._latents([part.stored() for part in self.key_parts], self.value_part.stored())

    def _latents(
        self, keys: list[StoredPart], values: StoredPart
    ) -> tuple[PackedLatents, PackedLatents]:
        tokens = self.get_seq_length()
        return PackedLatents(tuple(keys), tokens), PackedLatents((values,), tokens)

    def get_seq_length(self) -> int:
        """Tokens stored."""
        return self.value_part.tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many tokens a mask spans, and its offset."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """There is no most."""
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        """Remove tokens from the end, said as a negative number."""
        if tokens_to_remove > 0:
            raise ValueError(f"say the tokens to remove as {-tokens_to_remove}")
        for part in self.parts:
            part.crop(max(0, part.tokens + tokens_to_remove))

    def advance(self) -> None:
        """Take in a token that was written behind those stored."""
        for part in self.parts:
            part.advance()

    def _change(self, change: Callable[[Tensor], Tensor]) -> None:
        for part in self.parts:
            part.change(change)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the batch for beam search."""
        self._change(lambda room: room.index_select(0, beam_idx.to(room.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence ``repeats`` times."""
        self._change(lambda room: room.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences at ``indices``."""
        self._change(lambda room: room[indices, ...])

    def offload(self) -> None:
        """Move everything to the CPU."""
        self._change(lambda room: room.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        """Move everything back to the layer's device."""
        if self.is_initialized:
            self._change(lambda room: room.to(self.device, non_blocking=True))

    def reset(self) -> None:
        """Forget everything, the rooms included."""
        self._make_parts()
        self.is_initialized = False

    def nbytes(self) -> int:
        """Bytes of what is stored."""
        return sum(part.nbytes() for part in self.parts)

    def exact_nbytes(self) -> int:
        """Bytes of the numbers that are not packed, in :attr:`dtype`."""
        return sum(part.exact_nbytes() for part in self.parts)

    def nbytes_allocated(self) -> int:
        """Bytes of the rooms."""
        return sum(part.nbytes_allocated() for part in self.parts)


def cache_for(config: Any, offloading: bool = False) -> LatentCache:
    """Return the cache that a compressed model's config asks for.

    Args:
        config: with ``kv_layout``, ``kv_sinks`` and ``kv_window``.
        offloading: keep layers on the CPU while others run.
    """
    layouts = [config.layer_layout(layer) for layer in range(config.num_hidden_layers)]
    layers = [
        PackedLayer(layout, config.kv_sinks, config.kv_window) if layout.packed else GrowingLayer()
        for layout in layouts
    ]
    return LatentCache(layers, offloading=offloading)
