"""The tables about healing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bits_tables import increase
from cells import ROOT, asked_words, changes, figures, held_out_kl, results

from vdcompress.healing.settings import HIDDEN_WEIGHT, HealSettings
from vdcompress.report import Table

PYTHIA, LLAMA = "pythia-70m-standin", "llama-32m-standin"
MIDDLE = "middle"
HELD_OUT = ("held-out books", "held-out docs")
MILLION = 1e6
Row = dict[str, Any]


def ablation() -> Table:
    """Validation perplexity and divergence after every way to heal, of all its files."""
    rounds = _rounds()
    plans = list(dict.fromkeys(row["plan"] for rows in rounds.values() for row in rows))
    shown: list[tuple[str, ...]] = []
    for name, rows in rounds.items():
        cells = {(row["trial"], row["plan"]): row for row in rows}
        first = {row["plan"]: row["start"] for row in rows}
        start = (_chosen_by(first[plan]) if plan in first else "" for plan in plans)
        shown.append((name, "no training", *start, ""))
        for trial in dict.fromkeys(row["trial"] for row in rows):
            found = [cells.get((trial, plan)) for plan in plans]
            middle = [cells.get((MIDDLE, plan)) for plan in plans]
            ends = map(_against, found, middle)
            seconds = " / ".join(f"{row['seconds']:.0f}" for row in found if row is not None)
            shown.append((name, trial, *ends, seconds))
    header = ("round", "way", *(f"{plan}: perplexity, KL" for plan in plans), "seconds")
    if len(rounds) == 1:
        header, shown = header[1:], [row[1:] for row in shown]
    return Table("", header, tuple(shown), words=2 if len(rounds) > 1 else 1)


def _rounds() -> dict[str, list[Row]]:
    """Return the rows of every file of the ablation, by what its name says after the first's."""
    stem = "healing-ablation"
    names = sorted(path.stem for path in (ROOT / "bench" / "results").glob(f"{stem}*.json"))
    if not names:
        raise FileNotFoundError(stem)
    return {_round_name(name, stem): results(name)["rows"] for name in names}


def _round_name(name: str, stem: str) -> str:
    tokens = results(name)["tokens"] / MILLION
    words = name.removeprefix(stem).replace("-", " ").strip()
    return f"{words or 'first'}, {tokens:g}M"


def _chosen_by(found: dict[str, float]) -> str:
    return f"{found['val_ppl']:.3f}, {found['val_kl']:.4f}"


def _against(row: Row | None, middle: Row | None) -> str:
    """Return what a row is chosen by, and how far its divergence is from the middle's."""
    if row is None:
        return ""
    found = _chosen_by(row["end"])
    if middle is None or row is middle:
        return found
    return f"{found} ({row['end']['val_kl'] / middle['end']['val_kl'] - 1:+.1%})"


def targets(model: str, *, every: bool = False) -> Table:
    """Perplexity of every setting before and after healing.

    Args:
        model: the stand-in.
        every: show all ways to heal, not the default alone, and divergences on held-out text.
    """
    found = results(f"healing-targets-{model}")
    rows = [_target(row, found) for row in found["rows"] if every or _by_default(row)]
    rows.sort(key=lambda row: (-int(row[1]), row[0]))
    whole = str(found["base_bytes_per_token"])
    header = ("setting", "bytes per token", "of fp16", "no training", "healed", "its change")
    if every:
        header += ("windows, rate", "KL on held-out books / documents", "healed")
    width = len(header)
    first = ("*uncompressed*", whole, "100.0%", "", figures(found["base"]), "", "", "", "")
    return Table("", header, tuple(row[:width] for row in (first, *rows)))


def _by_default(row: Row) -> bool:
    """Say whether a row was healed at the rate of a finetune that is told nothing."""
    return bool(row["settings"]["learning_rate"] == HealSettings().learning_rate)


def _target(row: Row, found: dict[str, Any]) -> tuple[str, ...]:
    size = row["bytes_per_token"]
    share = f"{size / found['base_bytes_per_token']:.1%}"
    free, healed = row["training_free"], row["healed"]
    ends = (figures(free), figures(healed), changes(healed), _windows_and_rate(row))
    chosen = (held_out_kl(free), held_out_kl(healed))
    return (asked_words(row["asked"]), str(size), share, *ends, *chosen)


def _windows_and_rate(row: Row) -> str:
    settings = row["settings"]
    return f"{settings['batch_size']} x {row['length']}, {settings['learning_rate']:g}"


def bits(model: str) -> Table:
    """Perplexity with widths and bits from one budget, before and after healing both together."""
    found = results(f"healing-targets-{model}-bits")
    base = found["base"]
    rows = []
    for row in sorted(found["rows"], key=lambda row: row["reduction"]):
        free, healed = row["training_free"], row["healed"]
        ends = [cell for texts in (free, healed) for cell in _lost(texts, base)]
        rate = f"{row['settings']['learning_rate']:g}" if row["best_epoch"] else "not better"
        size = (f"{row['bytes_per_token']:,}", f"{1 - row['reduction']:.1%}")
        rows.append((asked_words(row["asked"]), *size, *ends, rate))
    first = ("*uncompressed*", f"{found['base_bytes_per_token']:,}", "100.0%", figures(base))
    ways = ("no training", "increase", "healed", "increase", "rate")
    blank = ("",) * (len(ways) - 1)
    return Table("", ("setting", "bytes per token", "of fp16", *ways), ((*first, *blank), *rows))


def _lost(texts: dict[str, Any], base: dict[str, Any]) -> tuple[str, str]:
    return figures(texts), f"{increase(texts, base):+.2%}"


def balance(model: str) -> Table:
    """Show what drawing short documents more often does, and longer windows, lower rates."""
    found = sorted(results(f"healing-balance-{model}")["rows"], key=lambda row: row["name"])
    names = list(dict.fromkeys(row["name"] for row in found))
    rows = []
    for row in sorted(found, key=lambda row: (names.index(row["name"]), _mean_kl(row))):
        settings = row["settings"]
        trained = settings["train"]
        if settings["hidden_weight"] != HIDDEN_WEIGHT:
            trained += f", states {settings['hidden_weight']:g}"
        ends = (figures(row["healed"]), held_out_kl(row["healed"]), f"{_mean_kl(row):.4f}")
        rows.append(
            (asked_words(row["asked"]), _drawn(row), _windows_and_rate(row), trained, *ends)
        )
    measured = ("books / docs / wikitext2", "KL on held-out books / documents", "mean")
    return Table(
        "", ("setting", "drawn", "windows, rate", "trained", *measured), tuple(rows), words=2
    )


def _drawn(row: Row) -> str:
    """Say which windows were drawn."""
    power = row.get("balance", 1.0)
    if power == 1:
        return "windows alike"
    words = "documents alike" if power == 0 else "documents by their root"
    return words if row.get("twice", True) else f"{words}, none twice"


def _mean_kl(row: Row) -> float:
    """Return the mean divergence on held-out books and documents, by which ways are chosen."""
    texts = [row["healed"][name]["kl"] for name in HELD_OUT]
    return sum(texts) / len(texts)


def long(model: str) -> Table:
    """Validation perplexity after each pass over the training text, of all its files."""
    found = [row for name in long_names(model) for row in results(name)["rows"]]
    most = max(len(row["epochs"]) for row in found)
    rows = []
    for row in found:
        settings = row["settings"]
        way = f"{settings['train']}, {settings['learning_rate']:g}"
        course = [f"{epoch['val_ppl']:.3f}" for epoch in row["epochs"]]
        course += [""] * (most - len(course))
        start = f"{row['initial_val_ppl']:.3f}"
        ends = (f"{row['tokens_seen'] / MILLION:.1f}M", figures(row["healed"]))
        rows.append((asked_words(row["asked"]), way, start, *course, *ends))
    passes = (f"pass {number}" for number in range(1, most + 1))
    ways = ("setting", "trained, rate", "start")
    header = (*ways, *passes, "tokens", "books / docs / wikitext2 at the best")
    return Table("", header, tuple(rows), words=2)


def long_names(model: str) -> list[str]:
    """Return the files of healing over several passes."""
    stem = f"healing-targets-{model}-long"
    names = sorted(path.stem for path in (ROOT / "bench" / "results").glob(f"{stem}*.json"))
    if not names:
        raise FileNotFoundError(stem)
    return names


def starts() -> Table:
    """How far healing goes, and how fast, from each start."""
    rows = results("healing-starts")["rows"]
    order = list(dict.fromkeys(row["plan"] for row in rows))
    shown = []
    for row in sorted(rows, key=lambda row: (-row["sequences"], order.index(row["plan"]))):
        epochs = len(row["epochs"])
        end = f"{row['best_epoch']} of {epochs}"
        end += "" if row["stopped_early"] else ", cut off"
        val = (row["initial_val_ppl"], row["epochs"][0]["val_ppl"], best_of(row))
        course = [f"{ppl:.2f}" for ppl in val]
        to = [_epochs(row[f"epochs_to_{goal}"], epochs) for goal in ("start", "first")]
        spent = (f"{row['tokens_seen'] / MILLION:.1f}M", f"{row['seconds']:.0f}")
        head = (f"{row['sequences']:,}", row["plan"], row["start"])
        shown.append((*head, *course, end, *to, *spent))
    course_names = ("at the start", "after an epoch", "best", "best epoch")
    to_names = ("epochs to the closed form", "to its first epoch")
    header = ("sequences", "setting", "start", *course_names, *to_names, "tokens", "seconds")
    return Table("", header, tuple(shown), words=3)


def best_of(row: Row) -> float:
    """Return the lowest validation perplexity of a finetune, the start's included."""
    return min(row["initial_val_ppl"], *(epoch["val_ppl"] for epoch in row["epochs"]))


def _epochs(found: int | None, most: int) -> str:
    return f"not in {most}" if found is None else str(found)


def speed() -> Table:
    """Tokens per second and memory of healing beside plain passes."""
    rows = []
    for row in results("healing-speed-cuda")["rows"]:
        ways = (row["plain"], row["heal"])
        speeds = (f"{way['speed'] / 1e3:.0f}k" for way in ways)
        memory = (f"{way['gib']:.1f}" for way in ways)
        shape = f"{row['batch']} x {row['length']}"
        rows.append((shape, row["train"], *speeds, f"{row['ratio']:.2f}", *memory))
    speeds = ("plain passes, tokens/s", "heal, tokens/s", "ratio")
    header = ("windows", "trained", *speeds, "plain, GiB", "heal, GiB")
    return Table("", header, tuple(rows), words=2)


TABLES: dict[str, Callable[[], Table]] = {
    "healing-ablation": ablation,
    "healing-pythia": lambda: targets(PYTHIA),
    "healing-llama": lambda: targets(LLAMA),
    "healing-pythia-held-out": lambda: targets(PYTHIA, every=True),
    "healing-llama-held-out": lambda: targets(LLAMA, every=True),
    "healing-bits-pythia": lambda: bits(PYTHIA),
    "healing-bits-llama": lambda: bits(LLAMA),
    "healing-balance": lambda: balance(PYTHIA),
    "healing-long": lambda: long(PYTHIA),
    "healing-starts": starts,
    "healing-speed": speed,
}
