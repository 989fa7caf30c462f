"""How the decode kernel cuts its work: a table, filled from ``bench/decode_cuda.py --sweep``."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """How work is cut.

    Attributes:
        rows: of a block, 16 or more.
        warps: of a program.
        stages: blocks that are on their way from memory at a time.
        programs: for each multiprocessor, where there is work for so many.
        registers: most of a thread; None leaves it to the compiler.
    """

    rows: int = 16
    warps: int = 1
    stages: int = 3
    programs: int = 8
    registers: int | None = None


LEAST_BLOCKS = 4  # of a program
# by the most bits of a part, and whether a row holds more than one latent
TABLE = {
    (16, True): Settings(16, 1, 3, 4),
    (8, True): Settings(16, 1, 3, 8),
    (4, True): Settings(16, 1, 4, 8),
    (3, True): Settings(32, 2, 3, 4),
    (2, True): Settings(16, 1, 4, 8),
    (16, False): Settings(32, 2, 3, 4),
    (8, False): Settings(32, 2, 3, 6),
    (4, False): Settings(32, 2, 4, 6),
    (3, False): Settings(32, 2, 3, 6),
    (2, False): Settings(32, 2, 4, 6),
}


def settings_for(bits: tuple[int, ...], tokens: int) -> Settings:
    """Return the settings.

    Args:
        bits: of each part's numbers.
        tokens: latents of a row.
    """
    known = [key for key, _ in TABLE]
    most = min(each for each in known if each >= min(max(bits), max(known)))
    return TABLE[most, tokens > 1]
