"""Pack text into sequences for training: nothing twice, nothing left out, and no padding.

Documents are cut into blocks of a few sequences; a random choice of blocks, as much as is needed,
is kept while the text streams by, then tokenised, joined and cut into sequences. Blocks are drawn
without replacement in proportion to their weights: each gets a random time, exponentially
distributed at the rate of its weight, and the earliest are kept (Efraimidis and Spirakis, 2006).
"""

from __future__ import annotations

import heapq
import math
import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch

from vdcompress.data.windows import (
    MOST_CHARACTERS_PER_TOKEN,
    batches,
    end_of_text,
    require_enough,
    token_ids,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BLOCK = 8  # sequences in a block, fewer where few are wanted, so that they come from many places
_FEWEST_BLOCKS = 64
_CHARACTERS_PER_TOKEN = 4
_SPACE = re.compile(r"\s")


def pack_windows(
    documents: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    count: int,
    length: int,
    seed: int,
    balance: float = 1.0,
    allow_fewer: bool = False,
) -> torch.Tensor:
    """Pack a random part of a text into sequences, in one pass over it.

    Blocks stand in the order of their times, each closed by the end-of-text token, so a sequence
    may run from one into the next; no token of the text is in two sequences. In memory are at most
    16 characters for each token asked for, however long the text is.

    Args:
        documents: texts.
        tokenizer: of the model.
        count: number of sequences.
        length: tokens of each.
        seed: the same seed and text give the same sequences.
        balance: a document weighs its length to this power, shared by its blocks: 1 makes all
            parts of the text equally likely, less makes those of short documents likelier.
        allow_fewer: where the text is short, return as many as it holds, at least one.

    Returns:
        Token ids, int64, shape [count, length].

    Raises:
        DataError: the text has fewer than ``count * length`` tokens.
        ModelError: the tokenizer has no end-of-text token.
    """
    end, wanted = end_of_text(tokenizer), count * length
    sequences = min(BLOCK, max(1, count // _FEWEST_BLOCKS))
    size = _CHARACTERS_PER_TOKEN * length * sequences
    blocks = (
        (block, len(text) ** (balance - 1)) for text in documents for block in _cut(text, size)
    )
    kept = _choose(blocks, MOST_CHARACTERS_PER_TOKEN * wanted, seed)
    packed = np.empty(wanted, dtype=np.int32)
    filled = 0
    for batch in batches(kept):
        for row in token_ids(batch, tokenizer):
            piece = [*row, end][: wanted - filled]
            packed[filled : filled + len(piece)] = piece
            filled += len(piece)
        if filled == wanted:
            break
    found = require_enough(filled, count, length, allow_fewer=allow_fewer)
    return torch.from_numpy(packed[: found * length].astype(np.int64)).view(found, length)


def _cut(text: str, size: int) -> Iterator[str]:
    """Cut a text into blocks of about ``size`` characters, before white space where there is."""
    start = 0
    while start < len(text):
        space = _SPACE.search(text, start + size, start + 2 * size)
        stop = space.start() if space else start + size
        yield text[start:stop]
        start = stop


def _choose(blocks: Iterable[tuple[str, float]], characters: int, seed: int) -> list[str]:
    """Return the earliest of weighted blocks by their times: all, or so many characters."""
    rng = np.random.default_rng(seed)
    kept: list[tuple[float, str]] = []
    size = 0
    for block, weight in blocks:
        time = -math.log1p(-rng.random()) / weight
        heapq.heappush(kept, (-time, block))
        size += len(block)
        while size > characters and len(kept) > 1:
            size -= len(heapq.heappop(kept)[1])
    return [block for _, block in sorted(kept, reverse=True)]
