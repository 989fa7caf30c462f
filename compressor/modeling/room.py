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
        if self._room is None or self._room.shape[-2] < stop:
            wanted = int(stop * GROWTH) if start else stop
            tokens = -(-wanted // self.block) * self.block
            larger = empty((b, g, tokens, n), dtype, device)
            if self._room is not None:
                larger[:, :, :start] = self.shown
            self._room = larger
        self.length = stop
        return self._room[:, :, start:stop]

    @property
    def shown(self) -> Tensor:
        """What is stored, a view [b, g, length, n]."""
        if self._room is None:
            raise RuntimeError("nothing was ever stored here")
        return self._room[:, :, : self.length]

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
