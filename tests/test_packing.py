"""Sequences packed for training: every token of the text once, whatever part of it is wanted."""

from __future__ import annotations

import json
import random
import re
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from vdcompress.data.corpus import Source, documents
from vdcompress.data.packing import pack_windows
from vdcompress.errors import DataError, ModelError
from vdcompress.events import Event, Warned
from vdcompress.pipeline import text
from vdcompress.recipe import Recipe

END = 0


def numbered(count: int = 3000, seed: int = 0) -> list[str]:
    """Return documents of very different lengths, in which every word is another."""
    draw = random.Random(seed)
    texts, word = [], 0
    while word < count:
        length = draw.choice([1, 5, 40, 400])
        texts.append(" ".join(f"w{n:06}" for n in range(word, word + length)))
        word += length
    return texts


def words_in(windows: torch.Tensor) -> list[str]:
    """Return the whole words of all windows; each is a byte per token."""
    letters = bytes(32 if n == END else TABLE[n] for n in windows.flatten().tolist())
    return re.findall(r"w\d{6}", letters.decode())


@pytest.fixture(autouse=True)
def _table(tiny_tokenizer: Any) -> None:
    for letter in "w0123456789 \n":
        [number] = tiny_tokenizer(letter)["input_ids"]
        TABLE[number] = ord(letter)


TABLE: dict[int, int] = {}


@pytest.mark.parametrize("count", [3, 40, 100])
def test_no_token_is_in_two_sequences(tiny_tokenizer: Any, count: int) -> None:
    found = pack_windows(numbered(), tiny_tokenizer, count=count, length=200, seed=1)

    assert found.shape == (count, 200)
    assert found.dtype == torch.int64
    words = words_in(found)
    assert len(words) > 0.97 * found.numel() / 8 - count
    assert len(set(words)) == len(words)


def test_all_of_a_text_can_be_had(tiny_tokenizer: Any) -> None:
    texts = numbered()
    tokens = sum(len(text) for text in texts)

    found = pack_windows(texts, tiny_tokenizer, count=10**4, length=100, seed=0, allow_fewer=True)

    assert found.numel() >= tokens - 100
    words = words_in(found)
    assert len(set(words)) == len(words) >= sum(text.count("w") for text in texts) - 15
    assert found.eq(END).sum() >= len(texts) - 15


def share_of_short_documents(windows: torch.Tensor, texts: list[str]) -> float:
    """Return the part of all words that is from documents of at most 40 words."""
    short = {word for text in texts if text.count("w") <= 40 for word in text.split()}
    words = words_in(windows)
    return sum(word in short for word in words) / len(words)


def test_balance_draws_short_documents_first_and_nothing_twice(tiny_tokenizer: Any) -> None:
    texts = numbered(20_000)

    def packed(balance: float) -> torch.Tensor:
        return pack_windows(texts, tiny_tokenizer, count=400, length=100, seed=1, balance=balance)

    shares = [share_of_short_documents(packed(balance), texts) for balance in (1.0, 0.5, 0.0)]
    whole = sum(text.count("w") for text in texts if text.count("w") <= 40) / 20_000
    assert shares[0] == pytest.approx(whole, abs=0.05)
    assert whole + 0.05 < shares[1] < shares[2] - 0.05
    words = words_in(packed(0.0))
    assert len(set(words)) == len(words)


def test_healing_draws_by_documents_unless_told_otherwise(
    tiny_tokenizer: Any, tmp_path: Path
) -> None:
    texts = numbered(20_000)
    lines = (json.dumps({"text": text}) for text in texts)
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    asked = {"heal.data": str(tmp_path / "a.jsonl"), "heal.samples": 400, "heal.seq_len": 100}

    def share(**more: float) -> float:
        recipe = Recipe().merged({**asked, **{f"heal.{name}": x for name, x in more.items()}})
        return share_of_short_documents(text.healing_windows(recipe, tiny_tokenizer)[0], texts)

    assert share() == share(balance=0.5) > share(balance=1.0) + 0.05


def test_balance_takes_nothing_from_a_text_that_is_wanted_whole(tiny_tokenizer: Any) -> None:
    texts = numbered()

    def words(balance: float) -> set[str]:
        found = pack_windows(
            texts, tiny_tokenizer, count=10**4, length=8, seed=0, balance=balance, allow_fewer=True
        )
        return set(words_in(found))

    assert len(words(0.5) ^ words(1.0)) < 8


def test_a_part_comes_from_all_over_the_text(tiny_tokenizer: Any) -> None:
    texts = numbered(20_000)

    found = pack_windows(texts, tiny_tokenizer, count=100, length=100, seed=3)

    numbers = torch.tensor([int(word[1:]) for word in words_in(found)]).float()
    last = sum(text.count("w") for text in texts)
    shares = torch.histc(numbers, bins=4, min=0, max=last) / len(numbers)
    assert shares.min() > 0.1


def test_the_seed_decides(tiny_tokenizer: Any) -> None:
    def pack(seed: int) -> torch.Tensor:
        return pack_windows(numbered(), tiny_tokenizer, count=20, length=50, seed=seed)

    assert torch.equal(pack(5), pack(5))
    assert not torch.equal(pack(5), pack(6))


def test_text_without_white_space_is_packed_too(tiny_tokenizer: Any) -> None:
    found = pack_windows(["w" * 5000], tiny_tokenizer, count=40, length=100, seed=0)

    assert found.shape == (40, 100)


def test_memory_depends_on_what_is_wanted_not_on_the_text(
    tiny_tokenizer: Any, tmp_path: Path
) -> None:
    for number in range(8):
        lines = (f"{line} " + "word " * 400 + "\n" for line in range(2000))
        (tmp_path / f"{number}.txt").write_text("".join(lines))
    total = sum(path.stat().st_size for path in tmp_path.iterdir())
    stream: Iterator[str] = documents(Source.parse(str(tmp_path)), "training")
    tracemalloc.start()

    pack_windows(stream, tiny_tokenizer, count=200, length=128, seed=0)

    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total > 30_000_000
    assert peak < 20_000_000  # 200 blocks of 64 KiB are looked at before the first is given out


def test_too_little_text_says_how_much_is_wanted(tiny_tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"about 1,00\d tokens, 2,000 are wanted") as caught:
        pack_windows(["some word " * 100], tiny_tokenizer, count=20, length=100, seed=0)
    assert "at most 10 windows" in caught.value.hint
    with pytest.raises(DataError, match="too short"):
        pack_windows([], tiny_tokenizer, count=1, length=9, seed=0, allow_fewer=True)


def test_a_tokenizer_without_end_of_text_is_refused(tiny_tokenizer: Any) -> None:
    from transformers import PreTrainedTokenizerFast

    endless = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer.backend_tokenizer)
    with pytest.raises(ModelError, match="end-of-text"):
        pack_windows(["x"], endless, count=1, length=1, seed=0)


def healing(recipe: Recipe, tokenizer: Any, **changed: Any) -> tuple[torch.Tensor, torch.Tensor]:
    overrides = {f"heal.{name}": value for name, value in changed.items()}
    return text.healing_windows(recipe.merged(overrides), tokenizer)


def test_validation_is_fixed_and_never_meets_training(tiny_tokenizer: Any, tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    texts = numbered(20_000)
    for part in range(3):
        (folder / f"{part}.txt").write_text("\n".join(texts[part::3]))
    recipe = Recipe().merged(
        {"heal.data": str(folder), "heal.samples": 50, "heal.seq_len": 64,
         "heal.validation_samples": 30}
    )  # fmt: skip

    training, validation = healing(recipe, tiny_tokenizer)

    for changed in ({"samples": 500}, {"seed": 9}, {"batch_size": 1}):
        others = healing(recipe, tiny_tokenizer, **changed)
        assert torch.equal(others[1], validation)
        assert not set(words_in(others[0])) & set(words_in(validation))
    whole, _ = healing(recipe, tiny_tokenizer, samples=10**6)
    assert len(whole) > 10 * len(training)
    assert not set(words_in(whole)) & set(words_in(validation))


def test_a_short_text_is_told_of(tiny_tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n".join(numbered()))
    recipe = Recipe().merged({"heal.data": str(tmp_path / "a.txt")})
    heard: list[Event] = []

    training, _ = text.healing_windows(recipe, tiny_tokenizer, heard.append)

    assert f"holds {len(training):,} sequences for training, not 20,000" in str(heard[0])
    assert all(isinstance(event, Warned) for event in heard)
