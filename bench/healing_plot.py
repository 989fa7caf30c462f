"""Draw the validation perplexity of long healing, pass by pass, from ``bench/results``.

python bench/healing_plot.py bench/healing-long.png
"""

from __future__ import annotations

import sys
from pathlib import Path

from cells import asked_words, results
from healing_tables import PYTHIA, long_names
from matplotlib.figure import Figure

from vdcompress.plots import DPI, png


def main() -> None:
    figure = Figure(figsize=(7.2, 4.2), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    for name in long_names(PYTHIA):
        for row in results(name)["rows"]:
            course = [row["initial_val_ppl"], *(epoch["val_ppl"] for epoch in row["epochs"])]
            settings = row["settings"]
            way = f"{settings['train']} trained, rate {settings['learning_rate']:g}"
            axes.plot(course, marker="o", markersize=4, label=f"{asked_words(row['asked'])}\n{way}")
    axes.set_xlabel(
        "passes over the training text (0 is the closed form, the last one is not whole)"
    )
    axes.set_ylabel("validation perplexity")
    axes.grid(visible=True, linewidth=0.4, alpha=0.6)
    axes.legend(fontsize=7)
    Path(sys.argv[1]).write_bytes(png(figure))


if __name__ == "__main__":
    main()
