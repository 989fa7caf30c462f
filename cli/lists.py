"""Lists that were typed, such as ``320,256``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from vdcompress.errors import UsageError, did_you_mean

T = TypeVar("T")


def values(flag: str, text: str | None, read: Callable[[str], T]) -> tuple[T, ...] | None:
    """Read ``320,256``, each value once; None stays None.

    Raises:
        UsageError: the list is empty, or a value is not what the flag takes.
    """
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise UsageError(f"{flag} {text!r} has an empty place", f"like: {flag} A,B")
    try:
        return tuple(dict.fromkeys(read(part) for part in parts))
    except ValueError as error:
        raise UsageError(f"{flag} {text!r}: {error}") from error


def whole(text: str) -> int:
    """Read a whole number above zero."""
    found = whole_or_zero(text)
    if not found:
        raise ValueError(f"{text} is not above zero")
    return found


def whole_or_zero(text: str) -> int:
    """Read a whole number."""
    if not (text.isascii() and text.isdigit()):
        raise ValueError(f"{text} is not a whole number")
    return int(text)


def share(text: str) -> float:
    """Read a fraction above 0 and at most 1."""
    try:
        found = float(text)
    except ValueError:
        found = 0.0
    if not 0 < found <= 1:
        raise ValueError(f"{text} is not a fraction above 0 and at most 1")
    return found


def one_of(choices: tuple[str, ...] | list[str]) -> Callable[[str], str]:
    """Return what reads one of some words."""

    def read(text: str) -> str:
        if text not in choices:
            raise ValueError(f"{text} is not a choice, {did_you_mean(text, choices)}")
        return text

    return read
