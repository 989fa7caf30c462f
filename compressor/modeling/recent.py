"""The newest tokens of a sequence, exact, in a buffer that is moved once in a while."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class Recent:
    """The last ``keep`` tokens [b, g, tokens, width] or a few more.

    Args:
        keep: how many tokens must stay; none are kept if that is 0.
    """

    def __init__(self, keep: int) -> None:
        self.keep, self.start, self.stop = keep, 0, 0
        self._buffer: Tensor | None = None
        self._first = 0  # where in the buffer token ``start`` is

    def extend(self, new: Tensor) -> tuple[Tensor, int]:
        """Add tokens; return all at hand, old and new, and the number of the first of them."""
        start, self.stop = self.start, self.stop + new.shape[2]
        if not self.keep:
            self.start = self.stop
            return new, start
        used = self.used
        if self._buffer is not None and used <= self._buffer.shape[2]:
            self._buffer[:, :, used - new.shape[2] : used] = new
            at_hand = self._buffer[:, :, self._first : used]
            self._drop(self.stop - self.keep)
            return at_hand, start
        at_hand = new if self._buffer is None else torch.cat((self._shown(new.shape[2]), new), 2)
        self._replace(at_hand, start)
        return at_hand, start

    @property
    def whole(self) -> Tensor:
        """The buffer."""
        if self._buffer is None:
            raise RuntimeError("nothing was ever stored here")
        return self._buffer

    @property
    def used(self) -> int:
        """Where in the buffer the next token goes."""
        return self._first + self.stop - self.start

    @property
    def first_of_whole(self) -> int:
        """Number of the token at the buffer's beginning, were there one."""
        return self.start - self._first

    @property
    def has_room(self) -> bool:
        """Whether one more token fits behind the others."""
        return not self.keep or self.used < self.whole.shape[2]

    def make_room(self) -> None:
        """Move the tokens to the buffer's beginning if there is no room for one more behind them.

        They move within the buffer.
        """
        if not self.has_room:
            self._drop(self.stop - self.keep)
            kept = self._shown().clone()
            self.whole[:, :, : kept.shape[2]] = kept
            self._first = 0

    def advance(self) -> None:
        """Take in a token that was written behind the others."""
        self.stop += 1
        if self.keep:
            self._drop(self.stop - self.keep)
        else:
            self.start = self.stop

    def _shown(self, missing: int = 0) -> Tensor:
        """Return the tokens in the buffer, all but the last ``missing``."""
        return self.whole[:, :, self._first : self.used - missing]

    def _replace(self, at_hand: Tensor, start: int) -> None:
        """Take a new buffer with the last tokens of ``at_hand``, which begins at ``start``."""
        kept = min(self.keep, at_hand.shape[2])
        buffer = at_hand.new_empty(*at_hand.shape[:2], 2 * self.keep, at_hand.shape[3])
        buffer[:, :, :kept] = at_hand[:, :, at_hand.shape[2] - kept :]
        self._buffer, self._first, self.start = buffer, 0, start + at_hand.shape[2] - kept

    def _drop(self, start: int) -> None:
        """Forget tokens before ``start``."""
        self._first += max(0, start - self.start)
        self.start = max(start, self.start)

    def view(self) -> tuple[Tensor, int]:
        """Return the tokens at hand and the number of the first."""
        return self._shown(), self.start

    def prepend(self, older: Tensor, start: int) -> None:
        """Put tokens that begin at ``start`` in front; those at hand follow at once or not at all.

        Where they do not follow they are forgotten.
        """
        rest = self._shown()[:, :, : max(0, self.stop - self.start)]
        if start + older.shape[2] < self.start:
            rest = rest[:, :, :0]
        joined = torch.cat((older, rest), dim=2)
        self.stop = start + joined.shape[2]
        room = max(2 * self.keep, joined.shape[2])
        self._buffer = joined.new_empty(*joined.shape[:2], room, joined.shape[3])
        self._buffer[:, :, : joined.shape[2]] = joined
        self._first, self.start = 0, start

    def crop(self, stop: int) -> None:
        """Forget the tokens from ``stop`` on."""
        self.stop, self.start = min(stop, self.stop), min(stop, self.start)

    def change(self, change: Callable[[Tensor], Tensor]) -> None:
        """Put what ``change`` makes of the buffer in its place."""
        if self._buffer is not None:
            self._buffer = change(self._buffer)

    def nbytes_of(self, tokens: int) -> int:
        """Bytes of so many tokens."""
        if self._buffer is None or not tokens:
            return 0
        return self._buffer[:, :, :1].numel() * self._buffer.element_size() * tokens

    def nbytes_allocated(self) -> int:
        """Bytes of the buffer."""
        return 0 if self._buffer is None else self._buffer.numel() * self._buffer.element_size()
