"""Read documents from a hub dataset as a stream; nothing is downloaded whole."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vdcompress.errors import DataError

MAX_CHARACTERS = 200_000_000
_OFFLINE_HINT = "give text of your own, --data FILE, or --data stdlib"


def splits(name: str, config: str | None) -> dict[str, Any]:
    """Open a dataset and return its splits as iterables of rows.

    Args:
        name: id on the hub, such as ``Salesforce/wikitext``.
        config: its configuration, such as ``wikitext-2-raw-v1``, or None.

    Raises:
        DataError: the hub cannot be reached, or it has no such dataset or configuration.
    """
    import datasets

    label = f"{name}:{config}" if config else name
    _reach(name)
    try:
        found = datasets.load_dataset(
            name, config, streaming=True, download_config=datasets.DownloadConfig(max_retries=1)
        )
    except Exception as error:  # the libraries beneath raise many unrelated types
        reason = f"{error}".strip().splitlines() or [type(error).__name__]
        raise DataError(f"cannot open dataset {label}: {reason[0]}", _OFFLINE_HINT) from error
    return dict(found)


def _reach(name: str) -> None:
    """Ask the hub once, without the long retries of the dataset library."""
    import huggingface_hub
    from huggingface_hub import errors

    try:
        huggingface_hub.HfApi().dataset_info(name, timeout=10)
    except errors.RepositoryNotFoundError as error:
        raise DataError(f"the hub has no dataset {name!r}, or it is private", _OFFLINE_HINT) from (
            error
        )
    except Exception as error:  # connection errors differ between versions of the client
        what = f"cannot reach the hub for dataset {name!r}, and no file has that name"
        raise DataError(what, _OFFLINE_HINT) from error


def texts(rows: Any, name: str, field: str) -> Iterator[str]:
    """Yield the documents of one split, at most :data:`MAX_CHARACTERS` characters of them.

    The rows of the wikitext datasets are lines: they are joined to articles.

    Raises:
        DataError: a row has no such field, or the connection breaks; while iterating.
    """
    lines = _field(rows, name, field)
    left = MAX_CHARACTERS
    for text in articles(lines) if "wikitext" in name else lines:
        yield text
        left -= len(text)
        if left <= 0:
            return


def _field(rows: Any, name: str, field: str) -> Iterator[str]:
    iterator = iter(rows)
    while True:
        try:
            row = next(iterator)
        except StopIteration:
            return
        except Exception as error:
            raise DataError(f"reading dataset {name!r} failed: {error}", _OFFLINE_HINT) from error
        if not isinstance(row.get(field), str):
            raise DataError(
                f"dataset {name!r} has no text field {field!r}", f"has: {', '.join(row)}"
            )
        yield row[field]


def articles(lines: Iterator[str]) -> Iterator[str]:
    """Join the lines of wikitext to articles; each begins with a line `` = Title = ``."""
    article: list[str] = []
    for line in lines:
        if line.startswith(" = ") and not line.startswith(" = = ") and article:
            yield "".join(article)
            article = []
        article.append(line if line.endswith("\n") else line + "\n")
    if article:
        yield "".join(article)
