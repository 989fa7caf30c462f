"""The course of a finetune as a picture, from a run's results and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vdcompress.plots import DPI, GREY, png, scale
from vdcompress.report import duration

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Results = Mapping[str, Any]

CURVES = "curves.png"
SIZE = (7.2, 4.4)


def pictures(results: Results) -> dict[str, bytes]:
    """Return the pictures that go into a run's folder, by name; none unless it was healed."""
    healing = results.get("healing")
    return {CURVES: curves(results)} if healing and healing["epochs"] else {}


def curves(results: Results) -> bytes:
    """Draw training and validation perplexity by epoch; the weights kept are marked.

    Args:
        results: of a run that was healed for one epoch or more.

    Returns:
        A PNG.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    healing = results["healing"]
    figure = Figure(figsize=SIZE, dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    numbers = [epoch["epoch"] for epoch in healing["epochs"]]
    trained = [epoch["train_ppl"] for epoch in healing["epochs"]]
    held_out = [healing["initial_val_ppl"], *(epoch["val_ppl"] for epoch in healing["epochs"])]
    axes.plot(numbers, trained, marker="s", markersize=4, color="C1", label="training")
    axes.plot([0, *numbers], held_out, marker="o", markersize=5, color="C0", label="validation")
    scale(axes.yaxis)
    _mark(axes, healing["best_epoch"], held_out)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("epoch (0 is the start)")
    axes.set_ylabel("perplexity")
    axes.set_title(_title(results), fontsize=10)
    axes.grid(visible=True, linewidth=0.4, alpha=0.6)
    axes.legend(fontsize=8, frameon=False)
    return png(figure)


def _mark(axes: Axes, best: int, held_out: list[float]) -> None:
    """Ring the epoch whose weights were kept, and say its perplexity."""
    value = held_out[best]
    axes.axvline(best, color=GREY, linewidth=0.8, linestyle=":")
    axes.plot(
        [best],
        [value],
        linestyle="none",
        marker="o",
        markersize=12,
        markerfacecolor="none",
        markeredgecolor="C0",
    )
    name = "the start" if best == 0 else f"epoch {best}"
    axes.annotate(
        f"kept: {name}, {value:.2f}", (best, value), (9, 9), textcoords="offset points", fontsize=8
    )


def _title(results: Results) -> str:
    model = str(results["model"]["id"]).rstrip("/").split("/")[-1]
    healing, cache = results["healing"], results["kv_cache"]
    return (
        f"{model}, cache {-100 * cache['reduction']:.4g}%: healed with "
        f"{healing['tokens']:,} tokens in {duration(healing['seconds'])}"
    )
