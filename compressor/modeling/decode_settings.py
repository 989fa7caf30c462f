"""How the decode kernel cuts its work: a table, filled from ``bench/decode_cuda.py --sweep``."""

from __future__ import annotations

from dataclasses import dataclass, replace


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
MIXED_PROGRAMS = 4  # where parts differ in bits
# by the most bits of a part, and how many latents a row holds
TABLE = {
    (16, 8): Settings(16, 1, 3, 4),
    (8, 8): Settings(16, 1, 4, 4),
    (4, 8): Settings(16, 1, 4, 4),
    (3, 8): Settings(32, 2, 3, 4),
    (2, 8): Settings(16, 1, 4, 8),
    (8, 4): Settings(32, 1, 3, 4),
    (4, 4): Settings(32, 1, 3, 4),
    (3, 4): Settings(32, 1, 3, 4),
    (2, 4): Settings(32, 1, 3, 4),
    (16, 2): Settings(16, 1, 3, 4),
    (8, 2): Settings(32, 1, 3, 4),
    (4, 2): Settings(64, 2, 3, 4),
    (3, 2): Settings(64, 2, 3, 4),
    (2, 2): Settings(64, 2, 3, 4),
    (16, 1): Settings(32, 2, 3, 4),
    (8, 1): Settings(32, 1, 3, 3),
    (4, 1): Settings(32, 1, 3, 4),
    (3, 1): Settings(32, 1, 3, 4),
    (2, 1): Settings(32, 1, 3, 4),
}


BY_CHANNEL = Settings(32, 1, 3, 8)  # whose rows are a group of tokens


def settings_for(bits: tuple[int, ...], tokens: int) -> Settings:
    """Return the settings for the most bits of a part.

    Args:
        bits: of each part's numbers.
        tokens: latents of a row.
    """
    known = {key for key, _ in TABLE}
    most = min(each for each in known if each >= min(max(bits), max(known)))
    found = TABLE[most, max(room for key, room in TABLE if key == most and room <= tokens)]
    return found if len(set(bits)) == 1 else replace(found, programs=MIXED_PROGRAMS)
