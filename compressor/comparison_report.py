"""Runs side by side as tables, from the document of ``compare`` and nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vdcompress.report import NONE, Table, change, count, duration, nats, ppl

Document = Mapping[str, Any]
Entry = Mapping[str, Any]
COLUMNS = ("base", "compressed", "healed")


def comparison_tables(found: Document) -> list[Table]:
    """Return what the runs keep, what that costs, by position too, and how they were made.

    A table without one figure is left out.
    """
    entries = found["runs"]
    tables = [_cache(entries), _perplexity(entries), _positions(entries), _making(entries)]
    return [table for table in tables if table is not None]


def final_perplexity(entry: Entry) -> float | None:
    """Return the perplexity of a run's model as it is: healed where it was healed."""
    perplexity = entry["perplexity"] or {}
    healed: float | None = perplexity.get("healed")
    return perplexity.get("compressed") if healed is None else healed


def bucket_perplexity(bucket: Mapping[str, Any] | None) -> float | None:
    """Return the perplexity of a bucket of positions, healed where it was healed."""
    if bucket is None:
        return None
    healed: float | None = bucket.get("healed")
    return bucket.get("compressed") if healed is None else healed


def _cache(entries: Sequence[Entry]) -> Table:
    rows = tuple(
        (
            entry["name"],
            count((entry["parameters"] or {}).get("compressed")),
            count(entry["kv_cache"]["base_bytes_per_token"]),
            count(entry["kv_cache"]["bytes_per_token"]),
            change(entry["kv_cache"]["base_bytes_per_token"], entry["kv_cache"]["bytes_per_token"]),
        )
        for entry in entries
    )
    header = ("run", "parameters", "base", "compressed", "change")
    return Table("parameters, and bytes per token of the cache", header, rows)


def _perplexity(entries: Sequence[Entry]) -> Table | None:
    rows = tuple(
        (
            entry["name"],
            *(ppl(perplexity.get(name)) for name in COLUMNS),
            change(perplexity.get("base"), final_perplexity(entry)),
            nats(perplexity.get("kl")),
        )
        for entry in entries
        if (perplexity := entry["perplexity"]) is not None
    )
    header = ("run", *COLUMNS, "change", "KL")
    return Table("perplexity", header, rows) if rows else None


def _positions(entries: Sequence[Entry]) -> Table | None:
    """Return perplexity by position: the base of the first run, then each run as it is."""
    buckets = {
        entry["name"]: {(b["from"], b["to"]): b for b in entry["positions"]}
        for entry in entries
        if entry["positions"]
    }
    if not buckets:
        return None
    edges = sorted({edge for found in buckets.values() for edge in found})
    bases = {tuple(ppl((f.get(e) or {}).get("base")) for e in edges) for f in buckets.values()}
    rows = [("base", *bases.pop())] if len(bases) == 1 else []
    for name, found in buckets.items():
        rows.append((name, *(ppl(bucket_perplexity(found.get(edge))) for edge in edges)))
    header = ("run", *(f"{start}-{stop}" for start, stop in edges))
    return Table("perplexity by position", header, tuple(rows))


def _making(entries: Sequence[Entry]) -> Table:
    rows = []
    for entry in entries:
        healing = entry["healing"]
        cells = (NONE, NONE, NONE)
        if healing is not None:
            best = f"{healing['best_epoch']} of {healing['epochs']}"
            cells = (count(healing["tokens"]), best, duration(healing["seconds"]))
        rows.append((entry["name"], *cells, duration(entry["seconds"])))
    header = ("run", "tokens", "best epoch", "training", "in all")
    return Table("how they were healed, and how long it took", header, tuple(rows))
