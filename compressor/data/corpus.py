"""Where text comes from, and the rule that keeps its roles apart.

A document has one role: ``training`` (calibration and healing draw from it), ``validation`` (early
stopping) or ``evaluation`` (the figures). The standard library and hub datasets bring their own
split; local files are split by a hash of each document's text, about 90/5/5; a file of few
documents is cut into blocks first, dealt out by position, so that every role gets some.
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vdcompress.data import files
from vdcompress.errors import DataError

Role = Literal["training", "validation", "evaluation"]
Kind = Literal["stdlib", "file", "folder", "hub"]

ROLES: tuple[Role, ...] = ("training", "validation", "evaluation")
FEW_DOCUMENTS = 200
_SPLITS: dict[Role, tuple[str, ...]] = {
    "training": ("train",),
    "validation": ("validation", "valid", "val", "dev"),
    "evaluation": ("test", "eval", "evaluation"),
}
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")


@dataclass(frozen=True)
class Source:
    """A source of text, as ``--data`` names it.

    Attributes:
        name: ``stdlib``, a path, or ``dataset`` / ``dataset:configuration`` on the hub.
        kind: which of these it is.
        field: the field that holds the text in JSON, parquet and datasets.
    """

    name: str
    kind: Kind
    field: str = "text"

    @classmethod
    def parse(cls, text: str, *, field: str = "text") -> Source:
        """Understand what the user typed; a file or folder that exists goes before a dataset.

        Raises:
            DataError: a file that is not there, an unknown ending, or not a dataset's id.
        """
        path = Path(text).expanduser()
        if text == "stdlib":
            return cls(text, "stdlib", field)
        if text.strip() and path.is_dir():
            return cls(str(path), "folder", field)
        if path.is_file():
            if not files.is_supported(path):
                endings = ", ".join(files.SUFFIXES)
                raise DataError(f"{text} has an unknown ending", f"known endings: {endings}")
            return cls(str(path), "file", field)
        looks_local = text.startswith((".", "/", "~")) or files.is_supported(path)
        if looks_local or not _HUB_ID.fullmatch(text):
            raise DataError(f"no such file or folder: {text!r}", "--data FILE, or --data stdlib")
        return cls(text, "hub", field)


def documents(source: Source, role: Role, *, whole: bool = False) -> Iterator[str]:
    """Yield the documents that ``source`` keeps for ``role``, in the order of the source.

    Args:
        source: where the text comes from.
        role: what it is for.
        whole: every document of a local source has the role asked for; for a file that serves
            one purpose only. A plain text is then one document.

    Raises:
        DataError: unreachable, damaged, or no text for this role; while iterating.
    """
    found = False
    for text in _of_role(source, role, whole):
        if text.strip():
            found = True
            yield text
    if not found:
        what = "no text" if whole else f"no text for {role}"
        raise DataError(f"{source.name} holds {what}", "give more text")


def _of_role(source: Source, role: Role, whole: bool) -> Iterator[str]:
    if source.kind == "stdlib":
        from vdcompress.data import stdlib

        return stdlib.documents(role)
    if source.kind == "hub":
        return _hub(source, role)
    texts = _local(source, blocks=not whole)
    return texts if whole else _split(texts, role)


def _local(source: Source, *, blocks: bool) -> Iterator[str]:
    path = Path(source.name)
    for file in files.in_folder(path) if source.kind == "folder" else [path]:
        yield from files.read(file, source.field, blocks=blocks)


def role_of(text: str) -> Role:
    """Return the role of a document of a local file, from a hash of its text."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return _role_at(int.from_bytes(digest, "big"))


def _role_at(number: int) -> Role:
    """Deal out 18, 1 and 1 of 20."""
    return {18: "validation", 19: "evaluation"}.get(number % 20, "training")  # type: ignore[return-value]


def _split(texts: Iterator[str], role: Role) -> Iterator[str]:
    """Keep one role's documents; few documents are cut into blocks, dealt out by position."""
    first = list(itertools.islice(texts, FEW_DOCUMENTS))
    if len(first) == FEW_DOCUMENTS:
        return (text for text in itertools.chain(first, texts) if role_of(text) == role)
    size = min(files.BLOCK, sum(map(len, first)) // 100 + 1)
    pieces = itertools.chain.from_iterable(_cut(text, size) for text in first)
    return (piece for number, piece in enumerate(pieces) if _role_at(number) == role)


def _cut(text: str, size: int) -> Iterator[str]:
    """Cut a text at line ends into blocks of at least ``size`` characters, the last one apart."""
    start = 0
    while start < len(text):
        end = text.find("\n", start + size - 1)
        stop = end + 1 if 0 <= end < start + 2 * size else start + size
        yield text[start:stop]
        start = stop


def _hub(source: Source, role: Role) -> Iterator[str]:
    """Use the dataset's own splits; a role that it lacks is taken from ``train`` by hash."""
    from vdcompress.data import hub

    name, _, config = source.name.partition(":")
    splits = hub.splits(name, config or None)
    own = {r: next((s for s in _SPLITS[r] if s in splits), None) for r in ROLES}
    if own["training"] is None:
        raise DataError(f"dataset {source.name} has no split 'train'", f"has: {', '.join(splits)}")
    lacking = [r for r in ROLES if own[r] is None]
    rows = splits[own[role] or own["training"]]
    texts = hub.texts(rows, name, source.field)
    if role in lacking or (role == "training" and lacking):
        shared = {"training", *lacking}
        return (t for t in texts if (r if (r := role_of(t)) in shared else "training") == role)
    return texts


class Hashed:
    """Documents that are hashed while something else reads them, at no further pass.

    Args:
        documents: texts; read once.
    """

    def __init__(self, documents: Iterable[str]) -> None:
        self._documents = documents
        self._hash = hashlib.sha256()

    def __iter__(self) -> Iterator[str]:
        for text in self._documents:
            data = text.encode("utf-8", "surrogatepass")
            self._hash.update(len(data).to_bytes(8, "big") + data)
            yield text

    def digest(self) -> str:
        """Return 16 hexadecimal digits for the documents read so far."""
        return self._hash.hexdigest()[:16]


def digest(source: Source, role: Role = "training", *, whole: bool = False) -> str:
    """Return 16 hexadecimal digits of the SHA-256 over the documents of one role.

    Raises:
        DataError: as :func:`documents`.
    """
    hashed = Hashed(documents(source, role, whole=whole))
    for _ in hashed:
        pass
    return hashed.digest()
