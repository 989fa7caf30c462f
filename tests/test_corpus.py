"""Sources of text: what is read, how roles are kept apart, and what bad files say."""

from __future__ import annotations

import gzip
import hashlib
import itertools
import json
import random
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vdcompress.data import corpus, hub
from vdcompress.data.corpus import ROLES, Hashed, Source, digest, documents, role_of
from vdcompress.errors import DataError

TEXTS = [f"document {number} says {'x' * (number % 7)}\n" for number in range(1000)]


def lines_of(texts: Iterable[str], field: str = "text") -> str:
    return "".join(json.dumps({"kind": "doc", field: text}) + "\n" for text in texts)


def joined(parts: Iterable[list[str]]) -> list[str]:
    return list(itertools.chain.from_iterable(parts))


def write_jsonl(path: Path) -> None:
    path.write_text(lines_of(TEXTS))


def write_gzip(path: Path) -> None:
    path.write_bytes(gzip.compress(lines_of(TEXTS).encode()))


def write_array(path: Path) -> None:
    path.write_text(json.dumps([{"text": text} for text in TEXTS], indent=1))


def write_strings(path: Path) -> None:
    path.write_text("\n\n".join(json.dumps(text) for text in TEXTS))


def write_parquet(path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"kind": ["doc"] * len(TEXTS), "text": TEXTS}), path)


FORMATS: dict[str, Callable[[Path], None]] = {
    "a.jsonl": write_jsonl,
    "b.jsonl.gz": write_gzip,
    "c.json": write_array,
    "d.jsonl": write_strings,
    "e.parquet": write_parquet,
    "F.JSONL": write_jsonl,
}


def all_of(path: Path, field: str = "text") -> list[str]:
    return list(documents(Source.parse(str(path), field=field), "evaluation", whole=True))


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_documents_in_order(name: str, tmp_path: Path) -> None:
    FORMATS[name](tmp_path / name)

    assert all_of(tmp_path / name) == TEXTS


@pytest.mark.parametrize("name", FORMATS)
def test_roles_never_overlap_and_leave_nothing_out(name: str, tmp_path: Path) -> None:
    FORMATS[name](tmp_path / name)
    source = Source.parse(str(tmp_path / name))

    parts = {role: list(documents(source, role)) for role in ROLES}

    assert sorted(joined(parts.values())) == sorted(TEXTS)
    assert 850 < len(parts["training"]) < 950
    assert all(25 < len(parts[role]) < 85 for role in ("validation", "evaluation"))


def test_a_documents_role_is_that_of_its_text_alone(tmp_path: Path) -> None:
    shuffled = random.Random(0).sample(TEXTS, 500)
    (tmp_path / "a.jsonl").write_text(lines_of(shuffled))

    for role in ROLES:
        found = list(documents(Source.parse(str(tmp_path / "a.jsonl")), role))
        assert found == [text for text in shuffled if role_of(text) == role]


def test_the_rule_of_roles_is_fixed() -> None:
    assert [role_of(f"text {number}") for number in range(40)].count("training") == 36
    assert (
        hashlib.sha256("".join(map(role_of, TEXTS)).encode()).hexdigest()[:16] == "313dad1b019c137d"
    )


def test_a_long_plain_text_serves_every_role_in_whole_lines(tmp_path: Path) -> None:
    lines = [f"{number}: {'word ' * (number % 30)}\n" for number in range(3000)]
    (tmp_path / "a.txt").write_text("".join(lines))
    source = Source.parse(str(tmp_path / "a.txt"))

    parts = {role: list(documents(source, role)) for role in ROLES}

    found = {role: "".join(blocks).splitlines(keepends=True) for role, blocks in parts.items()}
    assert sorted(joined(found.values())) == sorted(lines)
    assert 0.8 < len(found["training"]) / len(lines) < 0.95
    assert all(len(found[role]) > 50 for role in ("validation", "evaluation"))
    assert all_of(tmp_path / "a.txt") == ["".join(lines)]


def test_a_text_without_line_ends_serves_every_role(tmp_path: Path) -> None:
    text = "word " * 20_000
    (tmp_path / "a.txt").write_text(text)
    source = Source.parse(str(tmp_path / "a.txt"))

    parts = ["".join(documents(source, role)) for role in ROLES]

    assert sum(map(len, parts)) == len(text)
    assert all(parts)


def test_a_large_plain_text_is_read_as_a_stream_of_blocks(tmp_path: Path) -> None:
    lines = [f"{number} {'w' * 60}\n" for number in range(250_000)]
    (tmp_path / "a.txt").write_text("".join(lines))
    source = Source.parse(str(tmp_path / "a.txt"))

    parts = {role: list(documents(source, role)) for role in ROLES}

    assert max(len(block) for block in parts["training"]) < 66_000
    assert sorted("".join(joined(parts.values())).splitlines(keepends=True)) == sorted(lines)
    assert all(parts.values())


def test_few_documents_are_cut_so_that_every_role_gets_some(tmp_path: Path) -> None:
    texts = [f"{number}\n" * 500 for number in range(3)]
    (tmp_path / "a.jsonl").write_text(lines_of(texts))
    source = Source.parse(str(tmp_path / "a.jsonl"))

    parts = {role: "".join(documents(source, role)) for role in ROLES}

    assert sum(len(part) for part in parts.values()) == sum(map(len, texts))
    assert all(parts.values())


def test_a_folder_is_all_its_files(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "b.jsonl").write_text(lines_of(TEXTS[500:]))
    (tmp_path / "a.jsonl").write_text(lines_of(TEXTS[:499]))
    (tmp_path / "c.txt").write_text(TEXTS[499])
    (tmp_path / "notes.md").write_text("not data")

    assert sorted(all_of(tmp_path)) == sorted(TEXTS)


def test_another_field_can_hold_the_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(lines_of(TEXTS, field="body"))

    assert all_of(tmp_path / "a.jsonl", field="body") == TEXTS


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfwords")

    assert all_of(tmp_path / "a.txt") == ["words"]


def test_the_digest_is_of_the_documents_read(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl")
    write_gzip(tmp_path / "b.jsonl.gz")
    first, second = (Source.parse(str(tmp_path / name)) for name in ("a.jsonl", "b.jsonl.gz"))

    assert digest(first) == digest(second)
    assert len(digest(first)) == 16
    assert digest(first) != digest(first, "validation")
    hashed = Hashed(documents(first, "training"))
    assert list(hashed) == list(documents(first, "training"))
    assert hashed.digest() == digest(first)
    joined, apart = Hashed(["ab"]), Hashed(["a", "b"])
    assert [*joined, *apart]
    assert joined.digest() != apart.digest()


BAD_FILES: dict[str, tuple[str, bytes, str]] = {
    "empty": ("a.txt", b"", "no text"),
    "blank": ("a.txt", b" \n\n", "no text"),
    "no documents": ("a.jsonl", b"\n\n", "no text"),
    "empty array": ("a.json", b"[]", "no text"),
    "nul bytes": ("a.txt", b"word\0word", "binary"),
    "undecodable": ("a.txt", b"word \xff\xfe word", "UTF-8"),
    "undecodable lines": ("a.jsonl", b'{"text": "\xff"}', "UTF-8"),
    "not gzip": ("a.jsonl.gz", b'{"text": "x"}', "gzip"),
    "truncated gzip": ("a.jsonl.gz", gzip.compress(lines_of(TEXTS).encode())[:900], "gzip"),
    "corrupt gzip": (
        "a.txt.gz",
        gzip.compress(bytes(range(1, 100)) * 9)[:40] + b"\x00" * 60,
        "gzip|UTF-8|binary",
    ),
    "broken json": ("a.jsonl", b'{"text": "x"}\n{"text": ', "line 2 of .*not valid JSON"),
    "broken array": ("a.json", b'[{"text": "x"},', "not valid JSON"),
    "no field": ("a.jsonl", b'{"text": "x"}\n\n{"body": "y"}', "line 3 of .*no field 'text'"),
    "no string": ("a.jsonl", b'{"text": 3}', "not a string"),
    "no object": ("a.jsonl", b"3", "neither an object nor a string"),
    "not parquet": ("a.parquet", b"PAR1 is not enough", "not a parquet file"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_gives_one_clear_line(case: str, tmp_path: Path) -> None:
    name, content, message = BAD_FILES[case]
    (tmp_path / name).write_bytes(content)

    with pytest.raises(DataError, match=message) as caught:
        all_of(tmp_path / name)

    assert "\n" not in caught.value.message
    assert str(tmp_path / name) in caught.value.message
    assert caught.value.hint
    assert caught.value.exit_code == 3


def test_a_parquet_column_that_is_not_there(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet")

    with pytest.raises(DataError, match="no column 'body'") as caught:
        all_of(tmp_path / "a.parquet", field="body")
    assert "kind, text" in caught.value.hint


@pytest.mark.parametrize(
    "text", ["nowhere.txt", "./nowhere", "/nowhere", "a b", "", "a/b/c", "x.jsonl.gz"]
)
def test_what_is_no_file_and_no_dataset_is_refused_at_once(text: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        Source.parse(text)


def test_unknown_endings_and_empty_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.docx").write_text("words")

    with pytest.raises(DataError, match="unknown ending"):
        Source.parse(str(tmp_path / "a.docx"))
    with pytest.raises(DataError, match="no text files"):
        all_of(tmp_path)


def test_sources_are_told_apart(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl")

    assert Source.parse("stdlib").kind == "stdlib"
    assert Source.parse(str(tmp_path)).kind == "folder"
    assert Source.parse(str(tmp_path / "a.jsonl")).kind == "file"
    assert Source.parse("wikitext").kind == "hub"
    assert Source.parse("Salesforce/wikitext:wikitext-2-raw-v1").kind == "hub"


def test_the_standard_library_brings_its_own_split() -> None:
    from vdcompress.data import stdlib

    found = list(documents(Source.parse("stdlib"), "validation"))

    assert found == list(stdlib.documents("validation"))


class FakeHub:
    """Splits of a dataset, without the hub."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **splits: list[str]) -> None:
        self.asked: list[tuple[str, str | None]] = []
        self.splits = {name: [{"text": t} for t in texts] for name, texts in splits.items()}
        monkeypatch.setattr(hub, "splits", self.open)

    def open(self, name: str, config: str | None) -> dict[str, Any]:
        self.asked.append((name, config))
        return self.splits

    def read(self, role: corpus.Role, name: str = "some/data:part") -> list[str]:
        return list(documents(Source.parse(name), role))


def test_a_dataset_with_all_splits_uses_them(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeHub(monkeypatch, train=TEXTS[:300], validation=TEXTS[300:400], test=TEXTS[400:])

    assert fake.read("training") == TEXTS[:300]
    assert fake.read("validation") == TEXTS[300:400]
    assert fake.read("evaluation") == TEXTS[400:]
    assert fake.asked[0] == ("some/data", "part")


def test_a_split_that_lacks_is_taken_from_train(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeHub(monkeypatch, train=TEXTS, validation=["other"])

    training, evaluation = fake.read("training"), fake.read("evaluation")

    assert fake.read("validation") == ["other"]
    assert sorted(training + evaluation) == sorted(TEXTS)
    assert evaluation == [text for text in TEXTS if role_of(text) == "evaluation"]

    only = FakeHub(monkeypatch, train=TEXTS)
    parts = [only.read(role) for role in ROLES]
    assert sorted(joined(parts)) == sorted(TEXTS)
    assert all(parts)


def test_a_dataset_without_train_or_field_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeHub(monkeypatch, test=TEXTS)
    with pytest.raises(DataError, match="no split 'train'"):
        fake.read("evaluation")

    fake = FakeHub(monkeypatch, train=TEXTS)
    source = Source.parse("some/data", field="body")
    with pytest.raises(DataError, match="no text field 'body'"):
        list(documents(source, "training"))


def test_lines_of_wikitext_become_articles(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["", " = One = \n", "", " words . \n", " = = Part = = \n", " = Two = \n", " more \n"]
    fake = FakeHub(monkeypatch, train=lines, validation=["x"], test=["y"])

    found = fake.read("training", "Salesforce/wikitext:wikitext-2-raw-v1")

    assert found == [" = One = \n\n words . \n = = Part = = \n", " = Two = \n more \n"]


def test_a_dataset_is_read_up_to_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "MAX_CHARACTERS", 100)
    fake = FakeHub(monkeypatch, train=["x" * 40] * 10, validation=["x"], test=["y"])

    assert len(fake.read("training")) == 3


def test_a_connection_that_breaks_is_one_clear_line() -> None:
    def rows() -> Iterator[dict[str, str]]:
        yield {"text": "one"}
        raise ConnectionError("reset by peer")

    found = hub.texts(rows(), "some/data", "text")
    assert next(found) == "one"
    with pytest.raises(DataError, match="reading dataset 'some/data' failed"):
        next(found)


def test_an_unreachable_hub_fails_soon_with_a_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise OSError("Network is unreachable")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    started = time.perf_counter()

    with pytest.raises(DataError, match="cannot reach the hub") as caught:
        list(documents(Source.parse("Salesforce/wikitext:wikitext-2-raw-v1"), "training"))

    assert "--data" in caught.value.hint
    assert "\n" not in caught.value.message
    assert time.perf_counter() - started < 20


def test_an_unknown_configuration_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise ValueError("BuilderConfig 'x' not found.\nAvailable: ['y']")

    monkeypatch.setattr(hub, "_reach", lambda name: None)
    monkeypatch.setattr(datasets, "load_dataset", refuse)

    with pytest.raises(DataError, match="cannot open dataset some/data:x") as caught:
        hub.splits("some/data", "x")
    assert "\n" not in caught.value.message
