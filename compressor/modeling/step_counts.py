"""What changes from one step of decoding to the next, kept on the device.

A CUDA graph does again what it did, with the numbers that it finds in memory. So a step that is to
be replayed reads from there where it writes, and how many tokens it reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

LAYER_ROOM = 64  # numbers that the attention of one layer needs, at most


class Place(NamedTuple):
    """Where a step writes one token; None for what a part does not have.

    Attributes:
        token: in rooms of exact numbers.
        recent: in the buffer of recent tokens.
        source: of the token that is packed, in that buffer, or among the new ones.
        packed: in rooms of packed tokens.
    """

    token: int | None = None
    recent: int | None = None
    source: int | None = None
    packed: int | None = None


def common(places: Iterable[Place]) -> Place | None:
    """Return the place of all parts, None where they do not agree."""
    found = []
    for numbers in zip(*places, strict=True):
        known = {number for number in numbers if number is not None}
        if len(known) > 1:
            return None
        found.append(known.pop() if known else None)
    return Place(*found)


class Cut(Protocol):
    """How a layout's tokens are split among programs; equal ones need the same numbers."""

    def numbers(self, key: Any, value: Any) -> Sequence[int]:
        """Return what the kernel counts for these latents."""


class StepCounts:
    """The numbers of a step.

    Args:
        layers: of the model.
        device: that reads them.

    Attributes:
        masked: whether the mask that the model is given says anything.
    """

    def __init__(self, layers: int, device: torch.device) -> None:
        room = len(Place._fields) + layers * LAYER_ROOM
        self.all = torch.zeros(room, dtype=torch.int64, device=device)
        self.masked = False
        self._readers: dict[Cut, tuple[int, Callable[[], tuple[Any, Any]]]] = {}

    def at(self, first: str, count: int = 1) -> Tensor:
        """Return some fields of the place, int64 [count]."""
        index = Place._fields.index(first)
        return self.all[index : index + count]

    def of_cut(self, cut: Cut, stored: Callable[[], tuple[Any, Any]]) -> Tensor:
        """Return the numbers that a kernel reads.

        Args:
            cut: of its work.
            stored: returns a layer's keys and values as the next query will see them.
        """
        if cut not in self._readers:
            numbers = cut.numbers(*stored())
            if len(numbers) > LAYER_ROOM:
                raise RuntimeError(f"{len(numbers)} numbers for one layer")
            start = len(Place._fields) + len(self._readers) * LAYER_ROOM
            self._readers[cut] = (start, stored)
            self.all[start : start + len(numbers)] = torch.tensor(numbers, device=self.all.device)
        start, _ = self._readers[cut]
        return self.all[start : start + LAYER_ROOM]

    def refresh(self, place: Place) -> None:
        """Write the numbers of the next step."""
        found = [number or 0 for number in place]
        for cut, (start, stored) in self._readers.items():
            found += [0] * (start - len(found)) + list(cut.numbers(*stored()))
        self.all[: len(found)] = torch.tensor(found)
