"""The tables about serving with vLLM."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cells import ROOT, results

from vdcompress.report import Table

PREFIX = "vllm-cpu-"
ENGINES = {True: "stock", False: "plugin"}


def engines() -> Table:
    """Show every engine that was started: what it said, and what its cache holds."""
    rows = [
        (
            _model(name),
            ENGINES[row["stock"]]
            + ("" if row["options"].get("enforce_eager", True) else ", compiled"),
            str(row["ranks"]),
            row["layout"],
            row["ran"].split()[-1],
            f"{row['equal']} of {row['prompts']}",
            f"{row['tokens_per_gib']:,}",
            f"{row['gain']:.2f}",
        )
        for name in _names()
        for row in results(name)["rows"]
    ]
    header = ("model", "vLLM", "ranks", "K and V", "attention", "same text", "tokens", "of base's")
    return Table("", header, tuple(rows), words=5)


def load() -> Table:
    """Show what each layout did with the same requests and the same memory."""
    rows = tuple(
        (
            row["layout"],
            row["cache"],
            f"{row['tokens_in_cache']:,}",
            str(row["most_running"]),
            str(row["most_waiting"]),
            str(row["preemptions"]),
            f"{row['tokens_per_second']:.0f}",
            f"{row['tokens_per_cpu_second']:.0f}",
        )
        for row in results("serving-load")["rows"]
    )
    seen = ("tokens in cache", "most in flight", "most queued", "preemptions")
    header = ("K and V", "cache", *seen, "new tokens/s", "per CPU second")
    return Table("", header, rows, words=2)


def _engine(row: dict[str, Any]) -> str:
    """Return whether the plugin was there, and whether torch compiled the model."""
    eager = row["options"].get("enforce_eager", True)
    return ENGINES[row["stock"]] + ("" if eager else ", compiled")


def _names() -> list[str]:
    found = [path.stem for path in sorted((ROOT / "bench" / "results").glob(f"{PREFIX}*.json"))]
    if not found:
        raise FileNotFoundError(PREFIX)
    return found


def _model(name: str) -> Any:
    """Return which model a file is about."""
    words = name.removeprefix(PREFIX)
    return words if "standin" in words else f"random {words.split('-')[0]}"


TABLES: dict[str, Callable[[], Table]] = {"serving": engines, "serving-load": load}
