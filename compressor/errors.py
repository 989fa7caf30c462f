"""Errors that a user can act on: one line, one hint, one exit code each.

The command line prints ``error: <message>`` and ``hint: <hint>`` and exits with
``exit_code``; everything that is not a :class:`VDCompressError` is a fault of ours (exit 1).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class VDCompressError(Exception):
    """Base of all expected errors.

    Args:
        message: what is wrong, in one line.
        hint: what to do next, in one line; empty if nothing helps.
    """

    exit_code = 3

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(VDCompressError):
    """The command line or a function's arguments contradict each other (exit 2)."""

    exit_code = 2


class ModelError(VDCompressError):
    """The checkpoint is missing, damaged, unsupported or compressed already (exit 3)."""


class DataError(VDCompressError):
    """The text is unreachable, empty, binary or too short (exit 3)."""


class RecipeError(VDCompressError):
    """The recipe has an unknown key, a wrong value or a future version (exit 3)."""


class OptionError(RecipeError):
    """An option gives a recipe's key a value that no recipe takes (exit 2)."""

    exit_code = 2


class RunError(VDCompressError):
    """The run folder does not exist, is unfinished or is not empty (exit 3)."""


class ArtifactError(VDCompressError):
    """An artefact could not be written, or does not reload to the same logits (exit 3)."""


class PlanError(UsageError):
    """The plan does not fit the model; ``problems`` lists every reason at once (exit 2)."""

    def __init__(self, problems: Iterable[str], hint: str = "") -> None:
        self.problems = tuple(problems)
        super().__init__("; ".join(self.problems), hint)


class QualityGateError(VDCompressError):
    """The recipe's quality gate was missed; the artefact is kept and marked (exit 4)."""

    exit_code = 4


def did_you_mean(word: str, valid: Iterable[str]) -> str:
    """Return ``did you mean 'x'?`` for the closest valid name, else the list of valid names."""
    names = sorted(valid)
    close = difflib.get_close_matches(word, names, n=1)
    return f"did you mean {close[0]!r}?" if close else f"valid: {', '.join(names)}"
