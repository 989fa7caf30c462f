"""Sample random places of a text that is read once and never kept whole."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

_SPACE = re.compile(r"\s")


@dataclass(frozen=True)
class Places:
    """The text from each sampled place on.

    Attributes:
        texts: for each place the pieces of text from there on, one for each document that it
            reaches; at least the characters asked for, unless all text is shorter.
        total_characters: of all documents.
    """

    texts: list[list[str]]
    total_characters: int


def sample_places(
    documents: Iterable[str], *, count: int, characters: int, seed: int, balance: float = 1.0
) -> Places:
    """Sample ``count`` places, independent of each other.

    A place moves to the next white space (or the next document's start) so that no word is cut.
    Reservoir sampling: when a document arrives, each place moves into it with the probability
    that the document's weight has among the weights seen so far.

    Args:
        documents: texts, read once.
        count: number of places.
        characters: how much text to keep from each place on.
        seed: of the generator.
        balance: a document weighs its length to this power: 1 makes all places of the text equally
            likely, 0 all documents.
    """
    rng = np.random.default_rng(seed)
    places: list[list[str]] = [[] for _ in range(count)]
    lacking: dict[int, int] = {}
    head = _Head(characters)
    total, total_weight = 0, 0.0
    for text in documents:
        if not text:
            continue
        head.add(text)
        _extend(places, lacking, text)
        total += len(text)
        weight = len(text) ** balance
        total_weight += weight
        moved = rng.binomial(count, weight / total_weight)
        for place in rng.choice(count, size=moved, replace=False).tolist() if moved else ():
            piece = text[_start(text, int(rng.integers(len(text)))) :][:characters]
            places[place] = [piece] if piece else []
            lacking[place] = characters - len(piece)
            if lacking[place] <= 0:
                del lacking[place]
    for text in head.texts:
        _extend(places, lacking, text)
    return Places(places, total)


def _start(text: str, place: int) -> int:
    if place == 0:
        return 0
    space = _SPACE.search(text, place)
    return space.start() if space else len(text)


def _extend(places: list[list[str]], lacking: dict[int, int], text: str) -> None:
    """Let the places that still lack text run on into the next document."""
    for place, lack in list(lacking.items()):
        piece = text[:lack]
        places[place].append(piece)
        lacking[place] = lack - len(piece)
        if lacking[place] <= 0:
            del lacking[place]


class _Head:
    """The first characters of the whole text, where places near its end run on."""

    def __init__(self, characters: int) -> None:
        self._left = characters
        self.texts: list[str] = []

    def add(self, text: str) -> None:
        if self._left > 0:
            self.texts.append(text[: self._left])
            self._left -= len(text)
