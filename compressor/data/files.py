"""Read documents from local files: plain text, JSON lines, JSON, parquet, each also gzipped.

Everything is read as a stream, so that a large file never lies in memory whole; the exceptions
are a JSON array and, where it is asked for as one document, a plain text.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from vdcompress.errors import DataError

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".txt", ".txt.gz", ".parquet")
BLOCK = 65_536


def is_supported(path: Path) -> bool:
    """Say whether a file's name ends in one of :data:`SUFFIXES`."""
    return path.name.lower().endswith(SUFFIXES)


def in_folder(folder: Path) -> list[Path]:
    """Return the readable files of a folder and its subfolders, sorted by path.

    Raises:
        DataError: there is none.
    """
    found = sorted(path for path in folder.rglob("*") if path.is_file() and is_supported(path))
    if not found:
        raise DataError(f"{folder} holds no text files", f"known endings: {', '.join(SUFFIXES)}")
    return found


def read(path: Path, field: str, *, blocks: bool) -> Iterator[str]:
    """Yield the documents of one file.

    Args:
        path: a file that :func:`is_supported` knows.
        field: which field of a JSON object or a parquet table holds the text.
        blocks: cut a plain text at line ends into documents of about :data:`BLOCK` characters;
            else it is one document.

    Raises:
        DataError: the file is missing, damaged, not text, or an object has no such field; while
            iterating.
    """
    name = path.name.lower().removesuffix(".gz")
    with _clear_errors(path):
        if name.endswith(".parquet"):
            yield from _parquet(path, field)
        elif name.endswith(".txt"):
            with _open(path) as stream:
                yield from _plain(stream, path, blocks)
        else:
            with _open(path) as stream:
                yield from _json(stream, path, field)


def _open(path: Path) -> TextIO:
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig")
    return path.open(encoding="utf-8-sig")


@contextmanager
def _clear_errors(path: Path) -> Iterator[None]:
    """Turn what the operating system and the decoders raise into one clear line."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not text in UTF-8 ({error.reason})", "convert it to UTF-8, or give another"
        ) from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is not a complete gzip file: {error}", "fetch it again") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}", _FILE_HINT) from error


_FILE_HINT = f"give a file that ends in {', '.join(SUFFIXES)}"


def _plain(stream: TextIO, path: Path, blocks: bool) -> Iterator[str]:
    if not blocks:
        yield _without_nul(stream.read(), path)
        return
    while block := stream.read(BLOCK):
        yield _without_nul(block + stream.readline(BLOCK), path)


def _without_nul(text: str, path: Path) -> str:
    if "\0" in text:
        raise DataError(f"{path} is binary (it holds NUL bytes), not text", _FILE_HINT)
    return text


def _json(stream: TextIO, path: Path, field: str) -> Iterator[str]:
    """Read JSON lines, or one JSON array, whatever the name says."""
    first = stream.readline()
    while first and not first.strip():
        first = stream.readline()
    if first.lstrip().startswith("["):
        rows = _parse(first + stream.read(), f"{path}")
        for number, row in enumerate(rows, 1):
            yield _text_of(row, field, f"entry {number} of {path}")
        return
    number = 1
    line = first
    while line:
        if line.strip():
            place = f"line {number} of {path}"
            yield _text_of(_parse(line, place), field, place)
        line = stream.readline()
        number += 1


def _parse(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{place} is not valid JSON: {error}", "one JSON object a line") from error


def _text_of(row: Any, field: str, place: str) -> str:
    if isinstance(row, str):
        return row
    if not isinstance(row, dict):
        raise DataError(f"{place} is neither an object nor a string", f'like {{"{field}": "..."}}')
    if field not in row:
        fields = ", ".join(map(str, row)) or "none"
        raise DataError(f"{place} has no field {field!r}", f"its fields: {fields}")
    if not isinstance(row[field], str):
        raise DataError(f"field {field!r} in {place} is not a string", "name the field of the text")
    return str(row[field])


def _parquet(path: Path, field: str) -> Iterator[str]:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(path)
        names = table.schema_arrow.names
        if field not in names:
            raise DataError(f"{path} has no column {field!r}", f"its columns: {', '.join(names)}")
        for batch in table.iter_batches(batch_size=64, columns=[field]):
            yield from (text for text in batch.column(0).to_pylist() if isinstance(text, str))
    except pyarrow.ArrowException as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{path} is not a parquet file: {reason}", _FILE_HINT) from error
