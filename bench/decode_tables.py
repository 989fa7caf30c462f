"""The tables about decoding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from cells import results

from vdcompress.report import Table

MICRO = 1e6
EXACT = 16
ASKED_OF = "h200"
BASES = ("dynamic", "static")
WITHOUT_TILES = "decode-cpu-without-tiles"


def cuda(card: str) -> Table:
    """Show the time of one layer's decode attention beside its bound and the base's.

    What is asked in microseconds is asked of an H200; of others, the share of their own bandwidth.
    """
    found = results(f"decode-cuda-{card}")
    rows = []
    for row in found["rows"]:
        ours, base = row["seconds"], row["base"]
        rows.append(
            (
                row["shape"],
                row["name"],
                f"{row['bytes'] / 1e6:.1f}",
                f"{MICRO * ours:.1f}",
                f"{MICRO * row['bound']:.1f}",
                f"{row['bound'] / ours:.0%}",
                _asked(row, card),
                f"{MICRO * base:.1f}",
                f"{base / ours:.2f}",
            )
        )
    header = ("layer", "cache", "MB", "us", "bytes alone, us", "of the bandwidth", "asked")
    return Table("", (*header, "cuDNN, uncompressed, us", "times as fast"), tuple(rows), words=2)


def _asked(row: dict[str, Any], card: str) -> str:
    target = row["target_us"]
    if target is None:
        return ""
    bandwidth = results(f"decode-cuda-{ASKED_OF}")["copy_bytes_per_second"]
    share = f"{MICRO * row['bytes'] / bandwidth / target:.0%}"
    return f"{target:g} us, {share}" if card == ASKED_OF else share


def cpu_attention(run: str, only: int | None = None) -> Table:
    """Show the time of one layer's attention of one query on a CPU, by cache."""
    rows = tuple(
        (
            row["dtype"],
            f"{row['tokens']:,}",
            row["layout"],
            str(row["bits"]) if row["bits"] < EXACT else row["dtype"],
            f"{1e3 * row['seconds']:.2f}",
            f"{row['base_by_own']:.2f}",
            f"{row['own_by_exact']:.2f}" if "own_by_exact" in row else "",
        )
        for row in results(run)["attention"]
        if only in {None, row["tokens"]}
    )
    header = ("model", "tokens", "cache", "bits", "ms", "times as fast as the base")
    return Table("", (*header, "time by that without bits"), rows, words=4)


def cpu_models(run: str, only: int | None = None) -> Table:
    """Show the speed of whole steps on a CPU beside the base with transformers' caches."""
    rows = tuple(
        (
            row["dtype"],
            f"{row['tokens']:,}",
            row["layout"] if row["layout"] not in BASES else f"base, {row['layout']} cache",
            str(row["bits"]) if row["bits"] < EXACT else row["dtype"],
            f"{row['tokens_per_second']:.1f}",
            *(f"{row['faster_than'][kind]:.2f}" for kind in BASES),
        )
        for row in results(run)["whole"]
        if only in {None, row["tokens"]}
    )
    header = ("model", "tokens", "cache", "bits", "tokens per second")
    return Table("", (*header, *(f"by the {kind} cache" for kind in BASES)), rows, words=4)


def models_steps(card: str) -> Table:
    """Show the speed of a model's steps on CUDA, as plain calls and from graphs."""
    rows = tuple(
        (
            row["model"],
            f"{row['batch']} x {row['context']:,}",
            row["cache"],
            f"{row['cache_bytes'] / 1e6:,.0f}",
            f"{row['plain']:,.0f}",
            f"{row['graph']:,.0f}",
            *(f"{row['graph_faster_than'][kind]:.2f}" for kind in BASES),
        )
        for row in results(f"decode-models-cuda-{card}")["steps"]
    )
    header = ("model", "batch x tokens", "cache", "MB", "plain, tokens/s", "graph, tokens/s")
    return Table("", (*header, *(f"by base, {kind}" for kind in BASES)), rows, words=3)


def models_generate(card: str) -> Table:
    """Show the time of ``generate()`` on CUDA, to the first token and for each one after it."""
    rows = tuple(
        (
            f"{row['batch']} x {row['prompt']:,}",
            row["cache"],
            "yes, static cache" if row["compiled"] else "no",
            f"{1e3 * row['first_token']:.1f}",
            f"{1e3 * row['step']:.2f}",
            f"{row['tokens_per_second']:,.0f}",
        )
        for row in results(f"decode-models-cuda-{card}")["generate"]
    )
    header = (
        "batch x prompt",
        "cache",
        "compiled",
        "first token, ms",
        "each other, ms",
        "tokens/s",
    )
    return Table("", header, rows, words=3)


TABLES: dict[str, Callable[[], Table]] = {
    "decode-cuda-h100": lambda: cuda("h100"),
    "decode-cuda-h200": lambda: cuda("h200"),
    "decode-models-steps": lambda: models_steps("h100"),
    "decode-models-generate": lambda: models_generate("h100"),
    "decode-cpu-attention": lambda: cpu_attention("decode-cpu"),
    "decode-cpu-models": lambda: cpu_models("decode-cpu"),
    "decode-cpu-attention-without-tiles": lambda: cpu_attention(WITHOUT_TILES, 16384),
    "decode-cpu-models-without-tiles": lambda: cpu_models(WITHOUT_TILES, 32768),
}
