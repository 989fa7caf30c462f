"""Tokens and windows, against slow and plain ways to get them."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from typing import Any

import pytest
import torch

from vdcompress.data.reservoir import sample_places
from vdcompress.data.windows import draw_windows, tokenise
from vdcompress.errors import DataError, ModelError

END = 0


def some_documents(count: int = 60, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    words = ["".join(draw.choices("abcdefgh", k=draw.randint(1, 9))) for _ in range(500)]
    return [" ".join(draw.choices(words, k=draw.randint(1, 300))) + "\n" for _ in range(count)]


def plainly(documents: list[str], tokenizer: Any) -> list[int]:
    ids: list[int] = []
    for text in documents:
        ids += [*tokenizer(text, add_special_tokens=False)["input_ids"], END]
    return ids


def test_each_document_is_closed_by_the_end_of_text(tiny_tokenizer: Any) -> None:
    assert tiny_tokenizer.eos_token_id == END
    texts = some_documents()

    found = tokenise(iter(texts), tiny_tokenizer)

    assert found.dtype == torch.int64
    assert found.tolist() == plainly(texts, tiny_tokenizer)
    assert found.eq(END).sum() == len(texts)


@pytest.mark.parametrize("limit", [1, 50, 4321, 10**6])
def test_a_limit_only_cuts(tiny_tokenizer: Any, limit: int) -> None:
    texts = some_documents()

    found = tokenise(texts, tiny_tokenizer, limit=limit)

    assert found.tolist() == plainly(texts, tiny_tokenizer)[:limit]


@pytest.mark.parametrize("limit", [1, 100, 3000, 10**6])
@pytest.mark.parametrize("space", ["\n", " ", "\n\n  ", "\n" * 70])
def test_a_limit_of_one_long_text_only_cuts(tiny_tokenizer: Any, limit: int, space: str) -> None:
    text = space.join(some_documents(30))

    found = tokenise([text], tiny_tokenizer, limit=limit)

    assert found.tolist() == plainly([text], tiny_tokenizer)[:limit]


def test_no_text_gives_no_tokens(tiny_tokenizer: Any) -> None:
    assert tokenise([], tiny_tokenizer).shape == (0,)


def test_a_tokenizer_without_end_of_text_is_refused(tiny_tokenizer: Any) -> None:
    from transformers import PreTrainedTokenizerFast

    endless = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer.backend_tokenizer)

    with pytest.raises(ModelError, match="end-of-text"):
        tokenise(["x"], endless)
    with pytest.raises(ModelError, match="end-of-text"):
        draw_windows(["x"], endless, count=1, length=1, seed=0)


def test_windows_are_pieces_of_the_text(tiny_tokenizer: Any) -> None:
    texts = some_documents()
    circle = bytes(plainly(texts, tiny_tokenizer) * 2)

    found = draw_windows(iter(texts), tiny_tokenizer, count=40, length=120, seed=1)

    assert found.shape == (40, 120)
    assert found.dtype == torch.int64
    for window in found.tolist():
        assert bytes(number % 256 for number in window) in bytes(n % 256 for n in circle)
        first = tiny_tokenizer.decode(window[:1])
        before = circle.find(bytes(window)) - 1
        assert first == " " or before < 0 or circle[before] == END or first == "\n"


def test_the_same_seed_gives_the_same_windows(tiny_tokenizer: Any) -> None:
    texts = some_documents()

    def draw(seed: int) -> torch.Tensor:
        return draw_windows(texts, tiny_tokenizer, count=20, length=50, seed=seed)

    assert torch.equal(draw(5), draw(5))
    assert not torch.equal(draw(5), draw(6))
    assert len({tuple(row) for row in draw(5).tolist()}) > 15


def test_windows_run_on_into_the_next_document_and_around(tiny_tokenizer: Any) -> None:
    texts = ["ab", "cd", "ef"]
    ids = [plainly([text], tiny_tokenizer)[:-1] for text in texts]

    found = draw_windows(texts, tiny_tokenizer, count=1, length=6, seed=0)[0].tolist()

    rounds = [[*piece, END] for piece in ids * 2]
    starts = [[*itertools.chain(*rounds[start : start + 3])][:6] for start in range(3)]
    assert found in starts


@pytest.mark.parametrize("text", ["", " ", "word"])
def test_too_little_text_says_how_much_is_wanted(tiny_tokenizer: Any, text: str) -> None:
    with pytest.raises(DataError, match=r"too short.*1,000 are wanted \(10 windows of 100\)"):
        draw_windows([text] if text else [], tiny_tokenizer, count=10, length=100, seed=0)


def test_short_text_says_how_many_windows_fit(tiny_tokenizer: Any) -> None:
    texts = ["some words " * 100]  # 1,100 tokens of one byte

    with pytest.raises(DataError, match=r"about 1,10\d tokens, 2,000 are wanted") as caught:
        draw_windows(texts, tiny_tokenizer, count=20, length=100, seed=0)
    assert "at most 11 windows" in caught.value.hint

    found = draw_windows(texts, tiny_tokenizer, count=20, length=100, seed=0, allow_fewer=True)
    assert found.shape == (11, 100)
    with pytest.raises(DataError):
        draw_windows(texts, tiny_tokenizer, count=2, length=1200, seed=0, allow_fewer=True)


def test_text_of_very_long_tokens_still_fills_its_windows(tiny_tokenizer: Any) -> None:
    class LongTokens:
        """A tokenizer that makes one token of forty characters."""

        eos_token_id = END

        def __call__(self, texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
            return {"input_ids": [[1 + len(text) % 7] * (len(text) // 40) for text in texts]}

    found = draw_windows(["word " * 4000], LongTokens(), count=3, length=100, seed=0)  # type: ignore[arg-type]

    assert found.shape == (3, 100)


def test_places_are_uniform_over_characters() -> None:
    texts = ["a " * 50, "b " * 150, "c " * 300]
    counts: Counter[str] = Counter()
    for seed in range(20):
        places = sample_places(texts, count=200, characters=1, seed=seed)
        counts.update((pieces[0] or pieces[1]).strip() or pieces[0] for pieces in places.texts)
        assert places.total_characters == 1000

    letters = Counter()
    for seed in range(20):
        for pieces in sample_places(texts, count=200, characters=2, seed=seed).texts:
            letters["".join(pieces).strip()[:1]] += 1
    assert letters["a"] / 4000 == pytest.approx(0.1, abs=0.02)
    assert letters["b"] / 4000 == pytest.approx(0.3, abs=0.03)
    assert letters["c"] / 4000 == pytest.approx(0.6, abs=0.03)


def test_places_keep_no_more_text_than_asked_for() -> None:
    texts = (f"{number} " * 1000 for number in range(200))

    places = sample_places(texts, count=50, characters=300, seed=0)

    assert {sum(map(len, pieces)) for pieces in places.texts} == {300}
