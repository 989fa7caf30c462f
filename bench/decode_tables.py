"""The tables about decoding on CUDA."""

from __future__ import annotations

from collections.abc import Callable

from cells import results

from vdcompress.report import Table

MICRO = 1e6


def cuda() -> Table:
    """Show the time of one layer's decode attention beside its bound and the base's."""
    found = results("decode-cuda")
    rows = []
    for row in found["rows"]:
        ours, base = row["seconds"], row["base"]
        target = row["target_us"]
        rows.append(
            (
                row["shape"],
                row["name"],
                f"{row['bytes'] / 1e6:.1f}",
                f"{MICRO * ours:.1f}",
                "" if target is None else f"{target:g}",
                f"{MICRO * row['bound']:.1f}",
                f"{row['bound'] / ours:.0%}",
                f"{MICRO * base:.1f}",
                f"{base / ours:.2f}",
            )
        )
    header = ("layer", "cache", "MB", "us", "target", "bytes alone, us", "of the bandwidth")
    return Table("", (*header, "cuDNN, uncompressed, us", "times as fast"), tuple(rows), words=2)


TABLES: dict[str, Callable[[], Table]] = {"decode-cuda": cuda}
