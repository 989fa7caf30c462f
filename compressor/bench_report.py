"""A benchmark as tables, from the document of ``bench`` and nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vdcompress.report import NONE, Table

Document = Mapping[str, Any]
Row = Mapping[str, Any]
UNITS = ("B", "kB", "MB", "GB", "TB")


def bench_tables(found: Document) -> list[Table]:
    """Return one table of figures for each batch, and one of the reasons where there are none."""
    batches = dict.fromkeys(row["batch"] for row in found["rows"])
    tables = [_speeds([row for row in found["rows"] if row["batch"] == b], b) for b in batches]
    missing = _unmeasured(found["rows"])
    return [*tables, *([missing] if missing else [])]


def bench_legend(found: Document) -> str:
    """Return how to read the figures: what was measured and what not."""
    prompts = sorted({row["prefill_tokens"] for row in found["rows"]})
    lengths = " or ".join(f"{tokens:,}" for tokens in prompts)
    lines = (
        f"tokens per second over all sequences, {found['dtype']}; "
        f"rounds: {found['repeats']}, of which medians; each decodes {found['new_tokens']} tokens",
        "x dynamic, x static: times as fast as the base with that cache, in the same round",
        f"prefill: a prompt of {lengths} tokens, whatever the context",
        "peak: the weights, and the most memory held beside them while decoding",
        *found["notes"],
    )
    return "\n".join(lines) + "\n"


def _speeds(rows: Sequence[Row], batch: int) -> Table:
    graphs = any(row["graph_tokens_per_second"] is not None for row in rows)
    cells = tuple(
        (
            f"{row['context']:,}",
            row["cache"],
            _speed(row["prefill_tokens_per_second"]),
            _speed(row["decode_tokens_per_second"]),
            _times(row["speedup"].get("dynamic")),
            _times(row["speedup"].get("static")),
            *(_graph(row) if graphs else ()),
            size(row["cache_bytes"]),
            size(row["decode_peak_bytes"]),
        )
        for row in rows
    )
    middle = ("graph", "x dynamic", "x static") if graphs else ()
    speeds = ("prefill", "decode", "x dynamic", "x static", *middle)
    header = ("context", "cache", *speeds, "bytes", "peak")
    return Table(f"batch {batch}", header, cells, words=2)


def _graph(row: Row) -> tuple[str, ...]:
    others = (_times(row["graph_speedup"].get(name)) for name in ("dynamic", "static"))
    return (_speed(row["graph_tokens_per_second"]), *others)


def _unmeasured(rows: Sequence[Row]) -> Table | None:
    """Return why rows have no figures; a reason that many share is told once."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        if row["state"] != "done":
            key = (row["cache"], row["state"], row["reason"])
            found.setdefault(key, []).append(f"{row['context']:,} x {row['batch']}")
    cells = tuple((*key, ", ".join(where)) for key, where in found.items())
    return (
        Table("not measured", ("cache", "state", "reason", "context x batch"), cells, 4)
        if cells
        else None
    )


def _speed(value: float | None) -> str:
    if value is None:
        return NONE
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _times(value: float | None) -> str:
    return NONE if value is None else f"{value:.2f}"


def size(value: float | None) -> str:
    """Return bytes in the largest unit that leaves a whole one, or a dash."""
    if value is None:
        return NONE
    for unit in UNITS[:-1]:
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} {UNITS[-1]}"
