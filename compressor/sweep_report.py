"""A sweep as tables, from its document and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vdcompress.report import NONE, Table, change

Document = Mapping[str, Any]
BEST = "*"
BEST_PLAN = "+"
BUDGETS = (0.75, 0.5, 0.4, 0.33, 0.25, 0.2, 0.15, 0.1)
LEGEND = "* nothing beats it   + only the base's cache in few bits does"


def sweep_table(found: Document) -> Table:
    """Return every row that was measured, the base first, then the fewer bytes the lower.

    In the last column ``*`` marks what nothing beats, at most so many bytes and no more perplexity;
    ``+`` a plan that only the original's cache in few bits beats.
    """
    base = found["base"]
    whole = base["bytes_per_token"]
    rows = [(base["name"], whole, base["perplexity"], None)]
    for row in (*found["references"], *found["rows"]):
        if row["state"] == "done":
            perplexity = row["perplexity"]
            size = row["kv_cache"]["bytes_per_token"]
            rows.append((row["row"], size, perplexity["compressed"], perplexity["kl"]))
    rows.sort(key=lambda row: (-row[1], row[2] or 0))
    cells = tuple(
        (
            name,
            f"{size:,}",
            f"{100 * size / whole:.1f}%",
            NONE if perplexity is None else f"{perplexity:.2f}",
            "" if name == base["name"] else change(base["perplexity"], perplexity),
            NONE if kl is None else f"{kl:.4f}",
            _mark(name, found),
        )
        for name, size, perplexity, kl in rows
    )
    header = ("cache", "bytes", "of fp16", "perplexity", "change", "KL", "best")
    return Table("perplexity against bytes per token", header, cells)


def budget_table(found: Document) -> Table:
    """Return the row with the lowest perplexity within each of some budgets that any row fits."""
    base = found["base"]
    done = [row for row in (*found["references"], *found["rows"]) if row["state"] == "done"]
    rows = []
    for budget in BUDGETS:
        bound = budget * base["bytes_per_token"]
        fitting = [row for row in done if row["kv_cache"]["bytes_per_token"] <= bound]
        if fitting:
            best = min(fitting, key=lambda row: row["perplexity"]["compressed"])
            perplexity = best["perplexity"]["compressed"]
            size = f"{best['kv_cache']['bytes_per_token']:,}"
            cells = (f"{perplexity:.2f}", change(base["perplexity"], perplexity))
            rows.append((f"{budget:.0%}", best["row"], size, *cells))
    header = ("of fp16", "best", "bytes", "perplexity", "change")
    return Table("the best within a budget", header, tuple(rows), words=0)


def _mark(name: str, found: Document) -> str:
    if name in found["frontier"]:
        return BEST
    return BEST_PLAN if name in found["plan_frontier"] else ""


def unmeasured_table(found: Document) -> Table | None:
    """Return the rows without figures and why, None if there are none."""
    rows = tuple(
        (row["row"], row["state"], row["reason"] or "")
        for row in (*found["references"], *found["rows"])
        if row["state"] != "done"
    )
    return Table("not measured", ("cache", "state", "reason"), rows, words=3) if rows else None
