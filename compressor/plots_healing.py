"""The course of a finetune as a picture, from a run's results and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vdcompress.plots import DPI, GREY, png, scale
from vdcompress.report import CURVES, duration

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Results = Mapping[str, Any]

SIZE = (7.2, 5.2)


def pictures(results: Results) -> dict[str, bytes]:
    """Return the pictures that go into a run's folder, by name; none unless it was healed."""
    healing = results.get("healing")
    return {CURVES: curves(results)} if healing and healing["epochs"] else {}


def curves(results: Results) -> bytes:
    """Draw validation and training perplexity by epoch; the weights that were kept are ringed.

    Each has a panel and a scale of its own: what healing gains is often less than what lies
    between the two texts.

    Args:
        results: of a run that was healed for one epoch or more.

    Returns:
        A PNG.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    healing = results["healing"]
    figure = Figure(figsize=SIZE, dpi=DPI, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    epochs = [epoch["epoch"] for epoch in healing["epochs"]]
    held_out = [healing["initial_val_ppl"], *(epoch["val_ppl"] for epoch in healing["epochs"])]
    trained = [epoch["train_ppl"] for epoch in healing["epochs"]]
    above.plot([0, *epochs], held_out, marker="o", markersize=5, color="C0")
    below.plot(epochs, trained, marker="s", markersize=5, color="C1")
    _ring(above, healing["best_epoch"], held_out)
    for axes, name in ((above, "validation"), (below, "training")):
        scale(axes.yaxis)
        axes.set_ylabel(f"{name}\nperplexity")
        axes.axvline(healing["best_epoch"], color=GREY, linewidth=0.8, linestyle=":")
        axes.grid(visible=True, linewidth=0.4, alpha=0.6)
    below.xaxis.set_major_locator(MaxNLocator(integer=True))
    below.set_xlabel("epoch (0 is the start)")
    above.set_title(_title(results), fontsize=10)
    return png(figure)


def _ring(axes: Axes, best: int, held_out: list[float]) -> None:
    """Ring the epoch whose weights were kept, and say its perplexity."""
    kept = "the start" if best == 0 else f"epoch {best}"
    axes.plot(
        [best],
        [held_out[best]],
        linestyle="none",
        marker="o",
        markersize=12,
        markerfacecolor="none",
        markeredgecolor=GREY,
        label=f"kept: {kept}, {held_out[best]:.2f}",
    )
    axes.legend(fontsize=9, framealpha=1, edgecolor="none", loc="upper right")


def _title(results: Results) -> str:
    model = str(results["model"]["id"]).rstrip("/").split("/")[-1]
    healing, cache = results["healing"], results["kv_cache"]
    return (
        f"{model}, cache {-100 * cache['reduction']:.4g}%: healed with "
        f"{healing['tokens']:,} tokens in {duration(healing['seconds'])}"
    )
