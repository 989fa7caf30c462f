"""The energy that latents keep, drawn layer by layer; matplotlib is imported when it is drawn."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = 6
PANEL = (3.4, 2.6)
DPI = 130
SIDES = {"v": ("V", "-"), "k": ("K", "--")}
LOWEST = 1e-4


def energy(rows: Sequence[Mapping[str, Any]], title: str) -> bytes:
    """Draw what is left out against width, one panel for each layer.

    Solid lines are V, dashed ones K; colours are numbers of groups. Thin lines are single latents,
    drawn where all of them together would be as wide.

    Args:
        rows: the ``energy`` of an inspection.
        title: above all panels.

    Returns:
        A PNG.
    """
    from matplotlib.figure import Figure

    count = max(row["layer"] for row in rows) + 1
    columns = min(COLUMNS, math.ceil(math.sqrt(count)))
    lines = math.ceil(count / columns)
    figure = Figure(
        figsize=(PANEL[0] * columns + 1.4, PANEL[1] * lines + 0.6), layout="constrained"
    )
    panels = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True).flatten()
    for layer, axes in enumerate(panels):
        if layer < count:
            _panel(axes, [row for row in rows if row["layer"] == layer])
            axes.set_title(f"layer {layer}", fontsize=9)
        else:
            axes.set_axis_off()
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.supxlabel("numbers per token, all groups", fontsize=9)
    figure.supylabel("energy left out", fontsize=9)
    target = io.BytesIO()
    figure.savefig(target, format="png", dpi=DPI)
    return target.getvalue()


def _panel(axes: Axes, rows: Sequence[Mapping[str, Any]]) -> None:
    counts = sorted({row["groups"] for row in rows}, reverse=True)
    for row in rows:
        name, line = SIDES[row["side"]]
        sizes = [row["groups"] * width for width in row["widths"]]
        left = [max(1 - kept, LOWEST) for kept in row["kept"]]
        colour = f"C{counts.index(row['groups'])}"
        latents = "latent" if row["groups"] == 1 else "latents"
        if row["latent"] is not None:
            axes.plot(sizes, left, line, color=colour, linewidth=0.6, alpha=0.3)
            continue
        label = f"{name}, {row['groups']} {latents}"
        axes.plot(sizes, left, line, color=colour, linewidth=1.4, label=label)
    axes.set_yscale("log")
    axes.set_ylim(LOWEST, 1)
    axes.grid(visible=True, linewidth=0.4, alpha=0.6)
