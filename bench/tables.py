"""Write the tables of both READMEs from ``bench/results``; typed figures have no place there.

python bench/tables.py          rewrites README.md and bench/README.md
python bench/tables.py --check  exits 1 if one of them is not what it would write
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import Any

import bits_tables
import decode_tables
import healing_tables
import seed_tables
import serving_tables
from cells import ROOT, asked_words, changes, figures, held_out, held_out_kl, results

from vdcompress.report import Table

DOCUMENTS = (ROOT / "README.md", ROOT / "bench" / "README.md")
CHOSEN = ("fisher", "local", 4)
MARK = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def training_free(model: str, widths: tuple[int, ...]) -> Table:
    """Perplexity of every start at some widths."""
    found = results(f"training-free-{model}")
    cells: dict[tuple[str, str], dict[int, str]] = {}
    for row in found["rows"]:
        repair = row["refit"] if row["refit"] == "none" else f"local, {row['alternate']} rounds"
        cells.setdefault((row["initializer"], repair), {})[row["v_dim"]] = figures(row["texts"])
    rows = [
        (start, repair, *(by_width.get(width, "") for width in widths))
        for (start, repair), by_width in cells.items()
    ]
    first = ("uncompressed", "", *[figures(found["base"])] * len(widths))
    header = ("start", "repair", *(f"V {width}" for width in widths))
    return Table("", header, (first, *rows), words=2)


def healing() -> Table:
    """Perplexity after finetuning V 320, by setting."""
    found = results("heal-v320")
    rows = [("uncompressed", "", "", figures(found["base"]))]
    rows.append(
        (
            "no training",
            f"{found['rows'][0]['initial_val_ppl']:.3f}",
            "",
            figures(found["training_free"]),
        )
    )
    for row in sorted(found["rows"], key=lambda row: row["best_val_ppl"]):
        epochs = f"{row['best_epoch']} of {len(row['epochs'])}"
        rows.append((row["name"], f"{row['best_val_ppl']:.3f}", epochs, figures(row["texts"])))
    header = ("setting", "validation", "best epoch", "books / docs / wikitext2")
    return Table("", header, tuple(rows))


def cost() -> Table:
    """Time and memory of ``apply``."""
    found = results("apply-cost")
    spent, held = found["time"], found["memory"]
    solved = spent["calibrate"] + spent["rewrite"]
    rows = (
        ("calibrate + rewrite, seconds", f"{solved:.1f}", ""),
        ("plain forward passes, seconds", f"{spent['forward']:.1f}", ""),
        ("ratio", f"{spent['ratio']:.2f}", f"{spent['bound']:.2f}"),
        (
            "peak memory above imports, GB",
            f"{held['above_imports_bytes'] / 1e9:.2f}",
            f"{held['bound_bytes'] / 1e9:.2f}",
        ),
    )
    return Table("", ("apply, 64 windows of 2048 tokens", "measured", "bound"), rows)


def keys_and_groups(model: str) -> Table:
    """Perplexity of every request at some starts, quantised caches of the original among them."""
    found, caches = results(f"keys-and-groups-{model}"), results(f"quantized-caches-{model}")
    base, cells, sizes, changed = caches["base"], {}, {}, {}
    for row in found["rows"]:
        name = asked_words(row["asked"])
        start = (row["initializer"], row["refit"], row["alternate"])
        cells.setdefault(name, {})[start] = figures(row["texts"])  # cheaper maps come last
        changed[name] = changes(row["texts"])
        sizes[name] = row["bytes_per_token"]
    whole = base["bytes_per_token"]
    starts = (("pca", "none", 0), ("optimal", "none", 0), ("fisher", "none", 0), CHOSEN)
    rows = [
        (sizes[name], name, *(by_start.get(start, "") for start in starts), changed[name])
        for name, by_start in cells.items()
    ]
    blank = ("",) * (len(starts) - 1)
    for row in caches["rows"]:
        name = f"*{row['cache']} cache of the original*"
        found_figures = (figures(row["texts"]), changes(row["texts"]))
        rows.append((row["bytes_per_token"], name, *blank, *found_figures))
    rows.append((whole, "*uncompressed*", *blank, figures(found["base"]), ""))
    rows.sort(key=lambda row: (-row[0], row[1]))
    shown = tuple((name, str(size), f"{size / whole:.1%}", *rest) for size, name, *rest in rows)
    named = ("pca", "optimal", "fisher", "fisher, repaired", "its change")
    header = ("setting", "bytes per token", "of fp16", *named)
    return Table("", header, shown)


def starts(model: str, asked: dict[str, Any]) -> Table:
    """Perplexity of every start for one request."""
    rows = tuple(
        (
            row["initializer"],
            repair_words(row),
            row["maps"].replace("_", " "),
            figures(row["texts"]),
            held_out_kl(row["texts"]),
        )
        for row in results(f"keys-and-groups-{model}")["rows"]
        if row["asked"] == asked
    )
    measured = ("books / docs / wikitext2", "KL on held-out books / documents")
    return Table("", ("start", "repair", "maps", *measured), rows, words=3)


def repair_words(row: dict[str, Any]) -> str:
    """Return what follows an initialiser."""
    words = [] if row["refit"] == "none" else [row["refit"]]
    words += [f"{row['alternate']} rounds"] if row["alternate"] else []
    return ", ".join(words) or "none"


def predictions(model: str) -> Table:
    """Show the predicted loss of plans beside the divergence that was measured."""
    rows = {
        asked_words(row["asked"]): (
            f"{sum(row['predicted'].values()):.4f}",
            held_out_kl(row["texts"]),
        )
        for row in results(f"keys-and-groups-{model}")["rows"]
        if (row["initializer"], row["refit"], row["alternate"]) == CHOSEN
    }
    header = ("setting", "predicted, nats per token", "measured, books / documents")
    return Table("", header, tuple((name, *found) for name, found in rows.items()))


def calibration_sets(model: str) -> Table:
    """Perplexity by calibration set, one column for each request."""
    cells: dict[str, dict[str, str]] = {}
    for row in results(f"calibration-sets-{model}")["rows"]:
        cells.setdefault(row["set"], {})[asked_words(row["asked"])] = figures(row["texts"])
    requests = list(dict.fromkeys(name for by_asked in cells.values() for name in by_asked))
    rows = tuple(
        (name, *(by_asked.get(asked, "") for asked in requests)) for name, by_asked in cells.items()
    )
    return Table("", ("windows", *requests), rows)


def latent_bound() -> Table:
    """Compare the closed form with gradient descent on the same windows."""
    rows = tuple(
        (
            asked_words(row["asked"]),
            figures(row["closed_form"]),
            figures(row["descended"]),
            held_out(row["closed_form"]),
            held_out(row["descended"]),
        )
        for row in results("latent-bound-pythia-70m-standin")["rows"]
    )
    held = "held-out books / documents"
    header = ("setting", "closed form", "descended", f"{held}, closed form", f"{held}, descended")
    return Table("", header, rows, words=1)


def candidates() -> Table:
    """Show the metrics and repairs that were tried."""
    rows = tuple(
        (row["group"], tried(row), figures(row["texts"]), held_out(row["texts"]))
        for row in results("candidates-pythia-70m-standin")["rows"]
    )
    header = ("what", "candidate", "books / docs / wikitext2", "held-out books / documents")
    return Table("", header, rows, words=2)


def tried(row: dict[str, Any]) -> str:
    """Return what a candidate does, marked where another program measured it."""
    return row["words"] + (" *" if "laboratory" in row["measured"] else "")


TABLES: dict[str, Callable[[], Table]] = {
    "pythia": lambda: training_free("pythia-70m-standin", (384, 320, 256)),
    "llama": lambda: training_free("llama-32m-standin", (96, 80)),
    "healing": healing,
    "cost": cost,
    "keys-pythia": lambda: keys_and_groups("pythia-70m-standin"),
    "keys-llama": lambda: keys_and_groups("llama-32m-standin"),
    "starts-kv320": lambda: starts("pythia-70m-standin", {"v_dim": 320, "k_dim": 320}),
    "starts-mqa192": lambda: starts(
        "pythia-70m-standin", {"v_dim": 192, "k_dim": 192, "groups": 1}
    ),
    "predictions": lambda: predictions("pythia-70m-standin"),
    "calibration": lambda: calibration_sets("pythia-70m-standin"),
    "latent-bound": latent_bound,
    **bits_tables.TABLES,
    **healing_tables.TABLES,
    **seed_tables.TABLES,
    **serving_tables.TABLES,
    **decode_tables.TABLES,
    "candidates": candidates,
}


def filled(text: str) -> str:
    """Return a text with every marked table filled in."""
    return MARK.sub(lambda m: f"{m[1]}{table(m[2])}\n{m[3]}", text)


def table(name: str) -> str:
    """Return a table, or say that nobody has run its benchmark."""
    try:
        return TABLES[name]().markdown()
    except FileNotFoundError:
        return "Not measured yet."


def main() -> int:
    wrong = 0
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        new = filled(text)
        wrong |= int(new != text)
        if "--check" not in sys.argv:
            document.write_text(new, encoding="utf-8")
    return wrong if "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())
