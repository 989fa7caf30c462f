"""Contenders take turns, so that what disturbs the machine disturbs all of them alike.

A ratio is the median over rounds of the quotient of two speeds of one round.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence

import torch

from vdcompress.decode_speed import Contender, Pass

Outcome = list[Pass] | str
Measure = Callable[[Contender], Pass]


def rounds(
    contenders: Sequence[Contender],
    measure: Measure,
    count: int,
    on_round: Callable[[int], None] = lambda _done: None,
    *,
    optional: bool = False,
) -> dict[str, Outcome]:
    """Return what was measured, by name: a pass for each round, or why there is none.

    Each contender has its turn once in a round. Memory that ran out, and whatever a cache of
    another package raises, becomes the reason why a contender has no figures; it takes no part in
    later rounds.

    Args:
        contenders: in the order in which they take turns.
        measure: of one of them.
        count: of rounds.
        on_round: hears how many rounds are done.
        optional: whatever is raised is a reason, not only memory that ran out.
    """
    found: dict[str, Outcome] = {contender.name: [] for contender in contenders}
    for done in range(1, count + 1):
        for contender in contenders:
            passes = found[contender.name]
            if isinstance(passes, str):
                continue
            try:
                passes.append(measure(contender))
            except Exception as error:
                reason = _reason(error, optional or bool(contender.kind.needs))
                if reason is None:
                    raise
                found[contender.name] = reason
            if contender.model.device.type == "cuda":
                torch.cuda.empty_cache()
        on_round(done)
    return found


def median_speed(passes: Sequence[Pass]) -> float:
    """Return the median tokens per second."""
    return statistics.median(found.tokens_per_second for found in passes)


def median_peak(passes: Sequence[Pass]) -> int | None:
    """Return the median of the passes' peaks in bytes, None where none is known."""
    peaks = [found.peak_bytes for found in passes if found.peak_bytes is not None]
    return statistics.median_low(peaks) if peaks else None


def spread(passes: Sequence[Pass]) -> float:
    """Return by which share of their median the fastest and the slowest pass differ."""
    speeds = [found.tokens_per_second for found in passes]
    return (max(speeds) - min(speeds)) / statistics.median(speeds)


def ratios(found: Mapping[str, Outcome], name: str, others: Sequence[str]) -> dict[str, float]:
    """Return by how much one is faster than others: the median over rounds of the quotient.

    Args:
        found: what :func:`rounds` yielded.
        name: the one.
        others: those that were measured are the result's keys.
    """
    own = found[name]
    if isinstance(own, str):
        return {}
    return {
        other: statistics.median(
            a.tokens_per_second / b.tokens_per_second for a, b in zip(own, theirs, strict=False)
        )
        for other in others
        if not isinstance(theirs := found.get(other, ""), str) and theirs
    }


def _reason(error: Exception, optional: bool) -> str | None:
    """Return why an error leaves a contender without figures, None if it may not."""
    first = (str(error).strip().splitlines() or [""])[0]
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in first:
        return "out of memory"
    return f"{type(error).__name__}: {first}" if optional else None
