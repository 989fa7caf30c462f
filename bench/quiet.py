"""Rounds of a measurement that no other process of the machine disturbed."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

STAT = Path("/proc/stat")
SHARE = 0.1  # of one processor, that others may take
LONGEST = 30.0  # seconds until disturbed rounds are taken too
PAUSE = 0.2
T = TypeVar("T")


def quiet_rounds(measure: Callable[[], T], count: int) -> tuple[list[T], int]:
    """Return what a round measured, so many times, and how many of these rounds were quiet.

    A round is repeated where others took processors from it; when that lasts too long, the least
    disturbed ones are taken. Where the system does not say what runs, every round counts.

    Args:
        measure: one round.
        count: of rounds.
    """
    begun, found = time.perf_counter(), []
    while True:
        start, others = time.perf_counter(), _others()
        measured = measure()
        share = (_others() - others) / (time.perf_counter() - start)
        found.append((share, measured))
        best = sorted(found, key=lambda one: one[0])[:count]
        quiet = sum(share <= SHARE for share, _ in best)
        late = time.perf_counter() - begun > LONGEST
        if quiet == count or (late and len(best) == count):
            return [measured for _, measured in best], quiet
        if share > SHARE:
            time.sleep(PAUSE)


def _others() -> float:
    """Return the seconds that processors gave to other processes since the start."""
    if not STAT.exists():
        return 0.0
    user, nice, system, _idle, _wait, *rest = map(int, STAT.read_text().split("\n")[0].split()[1:])
    own = os.times()
    busy = (user + nice + system + sum(rest[:3])) / os.sysconf("SC_CLK_TCK")
    return busy - own.user - own.system
