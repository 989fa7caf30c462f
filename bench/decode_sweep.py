"""Try how the decode kernel cuts its work, one change at a time."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import torch
from decode_cases import Case, nbytes
from decode_timing import compile_ahead, drawn_caches, timed

from vdcompress.modeling.decode_sections import table_settings
from vdcompress.modeling.decode_settings import Settings

CUTS = ((16, 1), (32, 1), (32, 2), (64, 2), (64, 4))  # rows and warps
STAGES, PROGRAMS, REGISTERS = (2, 3, 4, 5), (2, 3, 4, 5, 6, 8, 10, 12, 16), (None, 168, 128)


def sweep(chosen: list[Case], limit: float, workers: int) -> list[dict[str, Any]]:
    """Try cuts of each case for its share of the time, one change at a time; return all."""
    stop = time.perf_counter() + limit
    compile_ahead([(case, s) for case in chosen[: len(chosen) // 2] for s in compilable()], workers)
    rows = []
    for index, case in enumerate(chosen):
        now = time.perf_counter()
        caches, query = drawn_caches(case)
        start = table_settings(caches[0], case.heads // case.groups)
        tried = searched(caches, query, start, now + (stop - now) / (len(chosen) - index))
        ranked = sorted(tried, key=lambda s: tried[s])
        found = [{**asdict(s), "seconds": tried[s]} for s in ranked if tried[s] < math.inf]
        rows.append({"name": case.name, "shape": case.shape, "bytes": nbytes(caches[0])})
        rows[-1] |= {"table": asdict(start), "table_seconds": tried[start], "tried": found}
        best = ranked[0]
        print(
            f"{1e6 * tried[best]:7.1f} us {words(best)}; table {1e6 * tried[start]:7.1f} us ",
            end="",
        )
        print(f"{words(start)}; {case.name}, {case.shape}, {len(tried)} tried", flush=True)
    return rows


def words(settings: Settings) -> str:
    return "/".join(str(value) for value in asdict(settings).values())


def searched(
    caches: list[Any], query: torch.Tensor, start: Settings, until: float
) -> dict[Settings, float]:
    """Return the seconds of settings, each one change from the best before it."""
    tried = {start: timed(caches, query, start)}
    for _ in range(2):
        for changed in neighbours(min(tried, key=lambda s: tried[s])):
            if changed in tried or time.perf_counter() > until:
                continue
            try:
                tried[changed] = timed(caches, query, changed)
            except Exception as error:  # out of shared memory or registers: not a candidate
                tried[changed] = math.inf
                print(f"  {words(changed)}: {type(error).__name__}", flush=True)
    return tried


def compilable() -> Iterator[Settings]:
    """Yield the cuts that need a kernel of their own and are likely met."""
    for (rows, warps), stages, registers in itertools.product(CUTS, STAGES[1:3], REGISTERS):
        yield Settings(rows, warps, stages, registers=registers)


def neighbours(of: Settings) -> Iterator[Settings]:
    """Yield settings that differ in one thing."""
    for rows, warps in CUTS:
        yield replace(of, rows=rows, warps=warps)
    for programs in PROGRAMS:
        yield replace(of, programs=programs)
    for stages in STAGES:
        yield replace(of, stages=stages)
    for registers in REGISTERS:
        yield replace(of, registers=registers)
