"""Which points nothing beats: the lowest perplexity at each number of bytes per token."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import TypeVar

Point = tuple[float, float]
Name = TypeVar("Name", bound=Hashable)


def frontier(points: Mapping[Name, Point]) -> tuple[Name, ...]:
    """Return the names of the points that no other beats, the fewest bytes first.

    A point is beaten by one that needs no more bytes and has no higher perplexity, one of both
    being lower; of equal points all stay.

    Args:
        points: bytes per token and perplexity by name.
    """
    kept: list[Name] = []
    lowest: Point | None = None
    for name, point in sorted(points.items(), key=lambda item: item[1]):
        if lowest is None or point[1] < lowest[1] or point == lowest:
            kept.append(name)
            lowest = point
    return tuple(kept)
