"""The tables of the original experiment, in its own form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from cells import results

from vdcompress.report import Table

COMPRESSED = "seed-vdproj"
RESTORING = {"seed-restore-e2e": "end to end", "seed-restore-2phase": "two phases"}
NAMES = {
    "seed-baseline": "uncompressed",
    "seed-restore-e2e": "restored, end to end",
    "seed-restore-2phase": "restored, two phases",
    COMPRESSED: "**compressed as is**",
}
Row = dict[str, Any]


def experiment() -> Table:
    """Parameters, cache, epochs and perplexity of every model, over all seeds."""
    found = _by_recipe()
    shown = []
    for recipe, rows in found.items():
        first = rows[0]
        counts = first["parameters"]
        size = f"{100 * first['reduction']:.4g}%"
        head = (NAMES[recipe], size, f"{counts['compressed']:,}", f"{counts['v_path']:,}")
        best = [row["epochs"][max(row["best_epoch"] - 1, 0)] for row in rows]
        epochs = [
            _each(len(row["epochs"]) for row in rows),
            _each(row["best_epoch"] for row in rows),
        ]
        ppl = [_mean([epoch["train_ppl"] for epoch in best]), _mean(_perplexities(rows))]
        against = [_against(rows, found.get(other, [])) for other in RESTORING]
        shown.append((*head, *epochs, *ppl, *against))
    sizes = ("model", "cache smaller", "parameters", "of V")
    course = ("epochs", "best epoch", "train perplexity", "validation perplexity")
    header = (*sizes, *course, *(f"to restored, {words}" for words in RESTORING.values()))
    return Table("", header, tuple(shown))


def epochs() -> Table:
    """Train and validation perplexity after every epoch, at each model's first seed."""
    courses = []
    for recipe, rows in _by_recipe().items():
        row = rows[0]
        if row["first_phase"] is not None:
            courses.append((f"{NAMES[recipe]}: the first", row["first_phase"]["epochs"]))
        courses.append((NAMES[recipe], row["epochs"]))
    most = max(len(course) for _, course in courses)
    shown = []
    for name, course in courses:
        cells = [f"{epoch['train_ppl']:.1f} / {epoch['val_ppl']:.1f}" for epoch in course]
        shown.append((name, *cells, *[""] * (most - len(cells))))
    header = ("train / validation", *(f"epoch {number}" for number in range(1, most + 1)))
    return Table("", header, tuple(shown))


def positions() -> Table:
    """Perplexity by position, and how far the compressed model's is from each other's."""
    found = _by_recipe()
    buckets = next(iter(found.values()))[0]["positions"]
    shown = [
        (NAMES[recipe], *(_mean(_perplexities(rows, place)) for place in range(len(buckets))))
        for recipe, rows in found.items()
    ]
    ours = found.get(COMPRESSED, [])
    for recipe, rows in found.items():
        if ours and recipe != COMPRESSED:
            cells = [_against(ours, rows, place) for place in range(len(buckets))]
            shown.append((f"compressed as is to {NAMES[recipe]}", *cells))
    header = ("tokens", *(f"{bucket['from']}-{bucket['to']}" for bucket in buckets))
    return Table("", header, tuple(shown))


def _by_recipe() -> dict[str, list[Row]]:
    """Return the rows of every model, by seed, in the order of :data:`NAMES`."""
    rows = sorted(results("seed-experiment")["rows"], key=lambda row: row["seed"])
    found = {name: [row for row in rows if row["recipe"] == name] for name in NAMES}
    return {name: made for name, made in found.items() if made}


def _perplexities(rows: Sequence[Row], place: int | None = None) -> list[float]:
    """Return each row's validation perplexity, or that of one bucket of positions."""
    if place is None:
        return [row["perplexity"] for row in rows]
    return [row["positions"][place]["perplexity"] for row in rows]


def _against(rows: Sequence[Row], others: Sequence[Row], place: int | None = None) -> str:
    """Return the mean difference in percent to another model of the same seed, and its range."""
    theirs = {row["seed"]: row for row in others}
    pairs = [(row, theirs[row["seed"]]) for row in rows if row["seed"] in theirs]
    if not pairs or rows[0]["recipe"] == others[0]["recipe"]:
        return ""
    changes = [
        _perplexities([row], place)[0] / _perplexities([other], place)[0] - 1
        for row, other in pairs
    ]
    return _spread([100 * change for change in changes], "{:+.1f}", "%")


def _mean(values: Sequence[float]) -> str:
    return _spread(values, "{:.1f}")


def _spread(values: Sequence[float], form: str, unit: str = "") -> str:
    """Return the mean, and from where to where the seeds go."""
    mean = form.format(sum(values) / len(values)) + unit
    if len(values) == 1:
        return mean
    return f"{mean} ({form.format(min(values))}{unit} to {form.format(max(values))}{unit})"


def _each(values: Any) -> str:
    """Return whole numbers one after another, or one where all are equal."""
    found = list(values)
    return ", ".join(map(str, found if len(set(found)) > 1 else found[:1]))


TABLES: dict[str, Callable[[], Table]] = {
    "seed-experiment": experiment,
    "seed-experiment-epochs": epochs,
    "seed-experiment-positions": positions,
}
