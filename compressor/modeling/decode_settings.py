"""How the decode kernel cuts its work, by shape: a table, measured."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """How work is cut.

    Attributes:
        rows: of a block, 16 or more.
        warps: of a program.
        stages: blocks that are on their way from memory at a time.
        programs: for each multiprocessor.
    """

    rows: int = 16
    warps: int = 1
    stages: int = 3
    programs: int = 8


DEFAULT = Settings()


def settings_for(parts: tuple[tuple[str, int, int], ...], heads: int) -> Settings:
    """Return the settings.

    Args:
        parts: form, bits and width of each part, the values last.
        heads: that share a latent.
    """
    return DEFAULT
