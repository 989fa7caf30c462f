"""Room that a cache writes into: tokens are added behind those stored, without copying them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .large_pages import empty

BLOCK = 64
GROWTH = 1.25


class Room:
    """A tensor [b, g, tokens, n] that grows along its tokens.

    The room is at most 1.25 times as large as what it holds, plus one block.

    Args:
        block: what the room is a multiple of.
    """

    def __init__(self, block: int = BLOCK) -> None:
        self.block, self.length = block, 0
        self._room: Tensor | None = None

    def append(self, new: Tensor) -> None:
        """Write new tokens [b, g, new, n] behind the stored ones."""
        self.extend(new.shape, new.dtype, new.device)[:] = new

    def extend(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Make room for new tokens and return it, [b, g, new, n], for the caller to write into."""
        b, g, new, n = shape
        start, stop = self.length, self.length + new
        if self._room is None:
            self._room = empty((b, g, self._capacity(stop), n), dtype, device)
        self.reserve(stop)
        self.length = stop
        return self.whole[:, :, start:stop]

    def reserve(self, tokens: int, ahead: int = 0) -> None:
        """Have room for so many tokens, old and new.

        Args:
            tokens: that must fit.
            ahead: move now, as far as is usual, if so many more would not fit.
        """
        room = self.whole
        b, g, before, n = room.shape
        after = self._capacity(int(tokens * GROWTH) if self.length else tokens)
        if before < tokens + ahead and before < after:
            larger = empty((b, g, after, n), room.dtype, room.device)
            larger[:, :, : self.length] = self.shown
            self._room = larger

    def _capacity(self, tokens: int) -> int:
        return -(-tokens // self.block) * self.block

    @property
    def whole(self) -> Tensor:
        """The room [b, g, capacity, n]; what lies behind the stored tokens means nothing."""
        if self._room is None:
            raise RuntimeError("nothing was ever stored here")
        return self._room

    @property
    def shown(self) -> Tensor:
        """What is stored, a view [b, g, length, n]."""
        return self.whole[:, :, : self.length]

    @property
    def is_empty(self) -> bool:
        """Whether nothing was ever stored."""
        return self._room is None

    def crop(self, length: int) -> None:
        """Forget all but the first ``length`` tokens."""
        self.length = min(self.length, length)

    def change(self, change: Callable[[Tensor], Tensor]) -> None:
        """Put what ``change`` makes of the room in its place."""
        if self._room is not None:
            self._room = change(self._room)

    def nbytes(self) -> int:
        """Bytes of what is stored."""
        return 0 if self._room is None else self.shown.numel() * self._room.element_size()

    def nbytes_allocated(self) -> int:
        """Bytes of the room."""
        return 0 if self._room is None else self._room.numel() * self._room.element_size()
