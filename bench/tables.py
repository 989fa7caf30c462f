"""Write the README's tables from the JSON in ``bench/results``; typed figures have no place there.

python bench/tables.py          rewrites README.md
python bench/tables.py --check  exits 1 if README.md is not what it would write
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vdcompress.report import Table

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
TEXTS = ("books_dev", "docs_dev", "wikitext2_valid")
MARK = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def results(name: str) -> dict[str, Any]:
    """Read one benchmark's JSON."""
    data: dict[str, Any] = json.loads((ROOT / "bench" / "results" / f"{name}.json").read_text())
    return data


def figures(texts: dict[str, Any]) -> str:
    """Return the three perplexities as ``books / docs / wikitext2``."""
    forms = ("{:.2f}", "{:.2f}", "{:.1f}")
    return " / ".join(
        form.format(texts[name]["perplexity"]) for form, name in zip(forms, TEXTS, strict=True)
    )


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


TABLES: dict[str, Callable[[], Table]] = {
    "pythia": lambda: training_free("pythia-70m-standin", (384, 320, 256)),
    "llama": lambda: training_free("llama-32m-standin", (96, 80)),
    "healing": healing,
    "cost": cost,
}


def filled(text: str) -> str:
    """Return a text with every marked table filled in."""
    return MARK.sub(lambda m: f"{m[1]}{TABLES[m[2]]().markdown()}\n{m[3]}", text)


def main() -> int:
    text = README.read_text(encoding="utf-8")
    new = filled(text)
    if "--check" in sys.argv:
        return int(new != text)
    README.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
