"""Pictures of what was measured, as PNG; matplotlib is imported when one is drawn."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vdcompress.frontier import frontier

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

Document = Mapping[str, Any]
Row = Mapping[str, Any]
Point = tuple[float, float]

SIZE = (9.0, 5.6)
DPI = 150
MARKERS = "osD^vPX<>p*h"
GREY = "0.35"
WIDE = 1.3
ROOM = 0.04
# of the ticks of a logarithmic axis: where it spans more than so many times, these digits
DIGITS = ((200, (1,)), (8, (1, 2, 5)), (4, (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)))


def sweep(found: Document) -> bytes:
    """Draw perplexity against bytes per token.

    The base is a line, its own cache in few bits are stars; plans with the same latents and
    initialiser are one series, a line through those of it that no other of it beats. Rings mark the
    plans that no other plan beats, a dotted line what nothing beats.

    Args:
        found: the document of a sweep, with one row or more that was measured.

    Returns:
        A PNG.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE, dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    _base(axes, found["base"])
    for number, (label, points) in enumerate(families(found["rows"]).items()):
        _series(axes, label, points, number)
    _references(axes, found["references"])
    _frontier(axes, found)
    scale(axes.xaxis)
    scale(axes.yaxis)
    axes.set_xlabel("cache, bytes per token")
    axes.set_ylabel("perplexity")
    axes.set_title(_title(found), fontsize=10)
    axes.grid(visible=True, which="major", linewidth=0.4, alpha=0.6)
    _legend(figure, axes)
    return png(figure)


def families(rows: Sequence[Row]) -> dict[str, list[Point]]:
    """Return the points of each series, (bytes per token, perplexity), the fewest bytes first.

    A series is labelled with the latents of a layer and how they were found; plans made from a
    budget, whose latents the allocation chose, are series of their own.
    """
    found: dict[str, list[Point]] = {}
    for row in rows:
        if row["state"] == "done":
            found.setdefault(_family(row), []).append(_point(row))
    return {label: sorted(points) for label, points in found.items()}


def _family(row: Row) -> str:
    plan, asked = row["plan"], row["settings"]["plan"]
    start = row["settings"]["start"]
    words = [_latents(plan) if asked.get("kv_budget") is None else "budget", start["initializer"]]
    words += [str(asked["allocation"])] if asked.get("allocation") else []
    words += [] if start.get("refit") in (None, "none") else [f"refit {start['refit']}"]
    return ", ".join(words)


def _latents(plan: Mapping[str, Any]) -> str:
    v, k = plan["v_groups"], plan["k_groups"]
    if v is None or k is None:
        return "latents by layer"
    if v == k:
        return f"{v} latent{'s' * (v > 1)}"
    return f"V {v}, K {k} latents"


def _point(row: Row) -> Point:
    return float(row["kv_cache"]["bytes_per_token"]), float(row["perplexity"]["compressed"])


def _columns(points: Sequence[Point]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _series(axes: Axes, label: str, points: list[Point], number: int) -> None:
    color, marker = f"C{number % 10}", MARKERS[number % len(MARKERS)]
    best = frontier(dict(enumerate(points)))
    axes.plot(*_columns([points[index] for index in best]), linewidth=1.2, color=color)
    axes.plot(*_columns(points), linestyle="none", marker=marker, color=color, label=label)


def _base(axes: Axes, base: Mapping[str, Any]) -> None:
    size, perplexity = base["bytes_per_token"], base["perplexity"]
    label = f"base, 16 bit: {perplexity:.2f}"
    axes.axhline(perplexity, color=GREY, linewidth=1, linestyle="--", label=label)
    axes.plot([size], [perplexity], marker="|", markersize=12, color=GREY)


def _references(axes: Axes, references: Sequence[Row]) -> None:
    label = "the base with its cache in few bits"
    for row in references:
        if row["state"] == "done":
            x, y = _point(row)
            axes.plot([x], [y], "*", markersize=13, color="black", label=label, zorder=3)
            axes.annotate(row["row"], (x, y), (6, 6), textcoords="offset points", fontsize=8)
            label = "_"  # once is enough


def _frontier(axes: Axes, found: Document) -> None:
    base, rows = found["base"], (*found["references"], *found["rows"])
    points = {row["row"]: _point(row) for row in rows if row["state"] == "done"}
    points[base["name"]] = (float(base["bytes_per_token"]), float(base["perplexity"]))
    best = _columns([points[name] for name in found["frontier"]])
    axes.plot(*best, ":", color="black", label="nothing beats these", zorder=1)
    plans = [points[name] for name in found["plan_frontier"] if name != base["name"]]
    axes.plot(
        *_columns(plans),
        linestyle="none",
        color="black",
        marker="o",
        markersize=12,
        markerfacecolor="none",
        markeredgewidth=0.8,
        label="no other plan beats these",
    )


def scale(axis: Axis) -> None:
    """Take logarithms where an axis spans much, with ticks that read as plain numbers."""
    name = "x" if axis is axis.axes.xaxis else "y"
    limits = axis.get_data_interval()
    low, high = float(limits[0]), float(limits[1])
    if high > WIDE * low > 0:
        room = (high / low) ** ROOM
        low, high, kind = low / room, high * room, "log"
    else:
        room = ROOM * (high - low or high)
        low, high, kind = low - room, high + room, "linear"
    axis.axes.set(**{f"{name}scale": kind, f"{name}lim": (low, high)})
    _ticks(axis, (low, high))


def _ticks(axis: Axis, limits: tuple[float, float]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

    low, high = limits
    if high / low > 4:
        digits = next(digits for above, digits in DIGITS if high / low > above)
        ticks = [
            digit * 10.0**power
            for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
            for digit in digits
        ]
    else:
        ticks = list(MaxNLocator(nbins=8, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high))
    axis.set_major_locator(FixedLocator([tick for tick in ticks if low <= tick <= high]))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))


def _title(found: Document) -> str:
    model = str(found["model"]["id"]).rstrip("/").split("/")[-1]
    data = str(found["data"]).rstrip("/").split("/")[-1]
    return f"{model}: {found['tokens']:,} tokens of {data}, windows of {found['window']:,}"


def _legend(figure: Figure, axes: Axes) -> None:
    figure.legend(
        *axes.get_legend_handles_labels(), loc="outside right upper", fontsize=8, frameon=False
    )


def png(figure: Figure) -> bytes:
    """Return a figure as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
