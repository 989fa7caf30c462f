"""Runs side by side as a picture, from the document of ``compare`` and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vdcompress.comparison_report import bucket_perplexity, final_perplexity
from vdcompress.errors import UsageError
from vdcompress.plots import DPI, GREY, MARKERS, png, scale

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Document = Mapping[str, Any]
Entry = Mapping[str, Any]
Panel = Callable[["Axes", Sequence[Entry]], None]

PANEL = (4.8, 4.2)
LEGEND_LINE = 0.24
GRID = {"visible": True, "linewidth": 0.4, "alpha": 0.6}


def comparison(found: Document) -> bytes:
    """Draw what each run costs, where in the window it costs it, and how it was healed.

    Perplexities are changes from each run's own base, so that runs of several models can share a
    panel. A run has one colour and marker everywhere; hollow is before healing.

    Args:
        found: the document of a comparison.

    Returns:
        A PNG.

    Raises:
        UsageError: no run has a figure to draw.
    """
    from matplotlib.figure import Figure

    entries = found["runs"]
    panels = [draw for draw, has in PANELS if any(map(has, entries))]
    if not panels:
        raise UsageError("no run was measured: there is nothing to draw", "leave -o out")
    width, height = PANEL[0] * len(panels), PANEL[1] + LEGEND_LINE * len(entries)
    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    for axes, draw in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        draw(axes, entries)
        axes.grid(**GRID)
    handles = [_handle(number, entry) for number, entry in enumerate(entries)]
    figure.legend(handles=handles, loc="outside lower left", fontsize=9, frameon=False)
    return png(figure)


def _look(number: int) -> dict[str, Any]:
    return {"color": f"C{number % 10}", "marker": MARKERS[number % len(MARKERS)]}


def _handle(number: int, entry: Entry) -> Any:
    from matplotlib.lines import Line2D

    cache = entry["kv_cache"]
    label = f"{entry['name']}: {cache['bytes_per_token']:,} bytes per token"
    if (value := final_perplexity(entry)) is not None:
        label += f", perplexity {value:.2f}"
    return Line2D([], [], label=label, linewidth=1.4, **_look(number))


def _change(base: float | None, value: float | None) -> float | None:
    """Return by how many percent a perplexity is above the base's."""
    return None if not base or value is None else 100 * (value / base - 1)


def _draw_cost(axes: Axes, entries: Sequence[Entry]) -> None:
    axes.plot([100], [0], marker="+", markersize=12, linestyle="none", color=GREY)
    axes.annotate("base", (100, 0), (-8, 6), textcoords="offset points", fontsize=8, ha="right")
    for number, entry in enumerate(entries):
        perplexity = entry["perplexity"] or {}
        base, before = perplexity.get("base"), perplexity.get("compressed")
        start, end = _change(base, before), _change(base, final_perplexity(entry))
        if end is None:
            continue
        size = 100 * (1 - entry["kv_cache"]["reduction"])
        if start is not None and perplexity.get("healed") is not None:
            look = _look(number) | {"markerfacecolor": "white"}
            axes.plot([size, size], [start, end], markevery=[0], linewidth=0.9, **look)
        axes.plot([size], [end], markersize=8, linestyle="none", **_look(number))
    axes.margins(0.12)
    axes.set_xlabel("cache, % of the base's bytes per token")
    axes.set_ylabel("perplexity, % above the base")
    axes.set_title("what it costs", fontsize=10)


def _draw_positions(axes: Axes, entries: Sequence[Entry]) -> None:
    edges = sorted({(b["from"], b["to"]) for entry in entries for b in entry["positions"] or ()})
    places = {edge: place for place, edge in enumerate(edges)}
    axes.axhline(0, color=GREY, linewidth=1, linestyle="--")
    for number, entry in enumerate(entries):
        points = [
            (places[bucket["from"], bucket["to"]], change)
            for bucket in entry["positions"] or ()
            if (change := _change(bucket.get("base"), bucket_perplexity(bucket))) is not None
        ]
        axes.plot([x for x, _ in points], [y for _, y in points], linewidth=1.2, **_look(number))
    axes.set_xticks(range(len(edges)), [f"{start}-{stop}" for start, stop in edges])
    axes.set_xlabel("position in the window, tokens")
    axes.set_ylabel("perplexity, % above the base")
    axes.set_title("where it costs it", fontsize=10)


def _draw_healing(axes: Axes, entries: Sequence[Entry]) -> None:
    from matplotlib.ticker import MaxNLocator

    for number, entry in enumerate(entries):
        if (healing := entry["healing"]) is None:
            continue
        curve, best = healing["validation"], healing["best_epoch"]
        axes.plot(range(len(curve)), curve, linewidth=1.2, markersize=4, **_look(number))
        axes.plot(
            [best],
            [curve[best]],
            marker="o",
            markersize=12,
            markerfacecolor="none",
            markeredgecolor=f"C{number % 10}",
        )
    scale(axes.yaxis)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("epoch (0 is the start; ringed: kept)")
    axes.set_ylabel("validation perplexity")
    axes.set_title("how it was healed", fontsize=10)


def _is_measured(entry: Entry) -> bool:
    return _change((entry["perplexity"] or {}).get("base"), final_perplexity(entry)) is not None


def _has_positions(entry: Entry) -> bool:
    return bool(entry["positions"]) and _is_measured(entry)


def _is_healed(entry: Entry) -> bool:
    return entry["healing"] is not None


PANELS: tuple[tuple[Panel, Callable[[Entry], bool]], ...] = (
    (_draw_cost, _is_measured),
    (_draw_positions, _has_positions),
    (_draw_healing, _is_healed),
)
