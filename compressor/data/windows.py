"""Turn text into tokens: whole for evaluation, windows at random places for everything else."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch

from vdcompress.data.reservoir import Places, sample_places
from vdcompress.errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHARACTERS_PER_TOKEN = 5
MOST_CHARACTERS_PER_TOKEN = 16
_BATCH_CHARACTERS = 500_000
_CUT = re.compile(r"\n(?=\S)")


def tokenise(
    documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, *, limit: int | None = None
) -> torch.Tensor:
    """Tokenise documents in their order, each closed by the end-of-text token.

    Args:
        documents: texts.
        tokenizer: of the model.
        limit: stop once so many tokens are there (an evaluation reads the first windows only).

    Returns:
        Token ids, int64, shape [n]; at most ``limit``.

    Raises:
        ModelError: the tokenizer has no end-of-text token.
        DataError: as the documents raise.
    """
    end = end_of_text(tokenizer)
    ids: list[int] = []
    for batch in batches(documents):
        texts = batch
        if limit is not None and len(batch) == 1:
            texts = [_beginning(batch[0], tokenizer, limit - len(ids))]
        for row in token_ids(texts, tokenizer):
            ids += row
            ids.append(end)
        if limit is not None and len(ids) >= limit:
            break
    return torch.tensor(ids[:limit], dtype=torch.long)


def end_of_text(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id of the token that closes a document.

    Raises:
        ModelError: there is none.
    """
    end = tokenizer.eos_token_id
    if not isinstance(end, int):
        raise ModelError("the tokenizer has no end-of-text token", "set eos_token in its config")
    return end


def token_ids(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Return each text's tokens, no special ones among them."""
    found: list[list[int]] = tokenizer(
        texts, add_special_tokens=False, return_attention_mask=False, verbose=False
    )["input_ids"]
    return found


def batches(documents: Iterable[str]) -> Iterator[list[str]]:
    """Group short documents, so that the tokenizer works in parallel and memory stays small."""
    batch: list[str] = []
    size = 0
    for text in documents:
        if batch and size + len(text) > _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
        batch.append(text)
        size += len(text)
    if batch:
        yield batch


def _beginning(text: str, tokenizer: PreTrainedTokenizerBase, tokens: int) -> str:
    """Return as much of a long text as certainly holds ``tokens`` tokens, cut at a line's end."""
    size = _CHARACTERS_PER_TOKEN * tokens
    while cut := _CUT.search(text, size):
        if len(token_ids([text[: cut.end()]], tokenizer)[0]) >= tokens:
            return text[: cut.end()]
        size *= 4
    return text


def draw_windows(
    documents: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    count: int,
    length: int,
    seed: int,
    balance: float = 1.0,
    allow_fewer: bool = False,
) -> torch.Tensor:
    """Draw windows of tokens at random places of the text, in one pass over it.

    Each place of the text is equally likely unless ``balance`` says otherwise; a window begins at
    white space, runs on into the next document after an end-of-text token, and from the last
    document to the first. Only the text of the windows is kept and tokenised.

    Args:
        documents: texts.
        tokenizer: of the model.
        count: number of windows.
        length: tokens of each.
        seed: the same seed and text give the same windows.
        balance: a document is drawn in proportion to its length to this power; below 1, long
            documents do not crowd out the short ones.
        allow_fewer: where the text is short, draw as many windows as it holds, at least one.

    Returns:
        Token ids, int64, shape [count, length].

    Raises:
        DataError: the text has fewer than ``count * length`` tokens (estimated from the windows).
        ModelError: the tokenizer has no end-of-text token.
    """
    end = end_of_text(tokenizer)
    most = MOST_CHARACTERS_PER_TOKEN * length
    places = sample_places(documents, count=count, characters=most, seed=seed, balance=balance)
    rows, per_character = _tokenise_places(places, tokenizer, length, end)
    available = int(places.total_characters * per_character)
    rows = rows[: require_enough(available, count, length, allow_fewer=allow_fewer)]
    return torch.tensor(_full(rows, length, end), dtype=torch.long)


def require_enough(available: int, count: int, length: int, *, allow_fewer: bool) -> int:
    """Return how many windows a text of so many tokens gives, at most ``count``.

    Raises:
        DataError: fewer than ``count``, or none where fewer are allowed.
    """
    fits = min(count, available // length)
    if fits < count and not (allow_fewer and fits):
        raise DataError(
            f"the text is too short: it has about {available:,} tokens, "
            f"{count * length:,} are wanted ({count:,} windows of {length:,})",
            f"give more text, or at most {fits:,} windows" if fits else "give more text",
        )
    return fits


def _tokenise_places(
    places: Places, tokenizer: PreTrainedTokenizerBase, length: int, end: int
) -> tuple[list[list[int]], float]:
    """Return the tokens of each place, at most ``length``, and the tokens per character."""
    likely = [_clip(pieces, _CHARACTERS_PER_TOKEN * length) for pieces in places.texts]
    rows = _rows(likely, tokenizer, end)
    tokens = sum(map(len, rows))
    characters = sum(len(piece) for pieces in likely for piece in pieces)
    short = [number for number, row in enumerate(rows) if len(row) < length]
    longer = _rows([places.texts[number] for number in short], tokenizer, end)
    for number, row in zip(short, longer, strict=True):
        rows[number] = row
    return [row[:length] for row in rows], tokens / max(characters, 1)


def _rows(places: list[list[str]], tokenizer: PreTrainedTokenizerBase, end: int) -> list[list[int]]:
    """Tokenise the pieces of each place and put the end-of-text token between them."""
    pieces = (piece for texts in places for piece in texts)
    ids = itertools.chain.from_iterable(token_ids(batch, tokenizer) for batch in batches(pieces))
    return [_join([next(ids) for _ in texts], end) for texts in places]


def _clip(pieces: list[str], characters: int) -> list[str]:
    kept: list[str] = []
    for piece in pieces:
        kept.append(piece[:characters])
        characters -= len(piece)
        if characters <= 0:
            break
    return kept


def _join(rows: list[list[int]], end: int) -> list[int]:
    """Put the end-of-text token between documents."""
    joined = list(rows[0]) if rows else []
    for row in rows[1:]:
        joined.append(end)
        joined += row
    return joined


def _full(rows: list[list[int]], length: int, end: int) -> list[list[int]]:
    """Lengthen what is still too short (text of very long tokens) by the windows after it."""
    full = []
    for number, row in enumerate(rows):
        long = list(row)
        following = number
        while len(long) < length:
            following = (following + 1) % len(rows)
            long += [end, *rows[following]]
        full.append(long[:length])
    return full
