"""What an interrupted training says, and what continues it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vdcompress.errors import UsageError


class Checkpoints:
    """What an interrupted training leaves behind."""

    def __init__(self) -> None:
        self.partial: Path | None = None

    def __call__(self) -> tuple[str, str]:
        """Say it."""
        if self.partial is None or not self.partial.is_dir():
            return "nothing was written", ""
        from vdcompress import runs

        return (
            f"checkpoints are kept in {self.partial}",
            f"continue with: {runs.resuming(self.partial)}",
        )


def require_alone(overrides: dict[str, Any], output: Path | None) -> None:
    """Refuse settings beside ``--resume``, which continues with those it was begun with."""
    given = [name.split(".")[-1] for name, value in overrides.items() if value is not None]
    given += ["output"] if output else []
    if given:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise UsageError(
            f"--resume continues with its own settings, not with {flags}",
            "leave them out, or start again without --resume",
        )
