"""What an interrupted training says, and what continues it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vdcompress.errors import UsageError

NOTHING = "nothing was written"


class Checkpoints:
    """What an interrupted training leaves behind.

    Args:
        hint: how to have something left, where nothing is yet.
    """

    def __init__(self, hint: str = "") -> None:
        self.partial: Path | None = None
        self.hint = hint

    def __call__(self) -> tuple[str, str]:
        """Say it."""
        if self.partial is None:
            return NOTHING, ""
        if not self.partial.is_dir():
            return f"nothing was written yet; {self.hint}" if self.hint else NOTHING, ""
        from vdcompress import runs

        return (
            f"checkpoints are kept in {self.partial}",
            f"continue with: {runs.resuming(self.partial)}",
        )


def require_alone(settings: dict[str, Any]) -> None:
    """Refuse settings beside ``--resume``, which continues with those it was begun with."""
    given = [name.split(".")[-1] for name, value in settings.items() if value is not None]
    if given:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise UsageError(
            f"--resume continues with its own settings, not with {flags}",
            "leave them out, or start again without --resume",
        )
