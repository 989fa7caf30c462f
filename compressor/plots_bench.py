"""A benchmark as a picture, from the document of ``bench`` and nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vdcompress.errors import UsageError
from vdcompress.plots import DPI, MARKERS, png, scale

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Document = Mapping[str, Any]
Row = Mapping[str, Any]
PANEL = (4.6, 3.4)
MEGABYTE = 1e6
GRID: dict[str, Any] = {"visible": True, "linewidth": 0.4, "alpha": 0.6}
PANELS = (
    ("decode_tokens_per_second", "decode, tokens per second", 1.0),
    ("graph_tokens_per_second", "decode from a CUDA graph", 1.0),
    ("cache_bytes", "cache, MB", MEGABYTE),
    ("decode_peak_bytes", "peak memory while decoding, MB", MEGABYTE),
)


def benchmark(found: Document) -> bytes:
    """Draw decode speed, cache and peak memory over the context: a column for each batch.

    Args:
        found: the document of a benchmark.

    Returns:
        A PNG.

    Raises:
        UsageError: no row has figures.
    """
    from matplotlib.figure import Figure

    done = [row for row in found["rows"] if row["state"] == "done"]
    if not done:
        raise UsageError("nothing was measured: there is nothing to draw", "leave -o out")
    batches = list(dict.fromkeys(row["batch"] for row in done))
    names = list(dict.fromkeys(row["cache"] for row in done))
    panels = [panel for panel in PANELS if any(row.get(panel[0]) is not None for row in done)]
    size = (PANEL[0] * len(batches), PANEL[1] * len(panels))
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    axes = figure.subplots(len(panels), len(batches), squeeze=False)
    for column, batch in enumerate(batches):
        rows = [row for row in done if row["batch"] == batch]
        for line, (key, label, unit) in enumerate(panels):
            _panel(axes[line][column], rows, names, key, unit)
            axes[line][column].set_ylabel(label)
        axes[0][column].set_title(f"batch {batch}", fontsize=10)
        axes[-1][column].set_xlabel("tokens in the cache")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", fontsize=9, frameon=False, ncols=3)
    return png(figure)


def _panel(axes: Axes, rows: Sequence[Row], names: Sequence[str], key: str, unit: float) -> None:
    for number, name in enumerate(names):
        points = sorted(
            (row["context"], row[key] / unit)
            for row in rows
            if row["cache"] == name and row.get(key) is not None
        )
        axes.plot(
            [x for x, _ in points],
            [y for _, y in points],
            color=f"C{number % 10}",
            marker=MARKERS[number % len(MARKERS)],
            linewidth=1.2,
            label="compressed" if name == "compressed" else f"base, {name}",
        )
    contexts = sorted({row["context"] for row in rows})
    axes.set_xscale("log", base=2)
    scale(axes.yaxis)
    axes.set_xticks(contexts, [f"{context:,}" for context in contexts])
    axes.xaxis.minorticks_off()
    axes.grid(**GRID)
