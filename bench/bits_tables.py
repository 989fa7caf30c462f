"""The frontier of widths and bits as tables."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from cells import asked_words, results

from vdcompress.modeling.schemes import SCHEMES
from vdcompress.report import Table

PARTS = {"v": "V", "k_nope": "K without RoPE", "k_rotary": "K with RoPE"}
TEXTS = ("books_dev", "docs_dev")
RIVALS = {  # what their rows are called
    "quantized-caches": "{} cache of the original",
    "peer-caches": "transformers, {}",
    "simulated-peers": "{}",
}


def frontier(model: str) -> Table:
    """Show ours and the rivals by bytes, the most first; what nothing beats is marked."""
    found = results(f"bits-frontier-{model}")
    rows = {row["name"]: row for row in found["rows"]}
    base = rows.pop("uncompressed")
    whole = base["bytes_per_token"]
    points = [(name, row["bytes_per_token"], row["texts"]) for name, row in rows.items()]
    points += [point for point in repaired(model) if point[0] not in rows]
    points += [
        (name.format(row["cache"]), round(row["bytes_per_token"]), row["texts"])
        for kind, name in RIVALS.items()
        for row in results(f"{kind}-{model}")["rows"]
    ]
    lost = {name: increase(texts, base["texts"]) for name, _, texts in points}
    best = {
        name
        for name, size, _ in points
        if not any(beats(p, size, lost[name], lost) for p in points)
    }
    cells = [("*uncompressed*", f"{whole:,}", "100.0%", figures(base["texts"]), "", "")]
    for name, size, texts in sorted(points, key=lambda point: (-point[1], lost[point[0]])):
        predicted = rows.get(name, {}).get("predicted")
        cells.append(
            (
                name,
                f"{size:,}",
                f"{size / whole:.1%}",
                figures(texts),
                f"{lost[name]:+.2%}" + (" *" if name in best else ""),
                "" if predicted is None else f"{math.expm1(predicted):+.2%}",
            )
        )
    header = ("cache", "bytes per token", "of fp16", "books / docs", "increase", "predicted")
    return Table("", header, tuple(cells))


def beats(point: tuple[str, int, Any], size: int, increase: float, lost: dict[str, float]) -> bool:
    """Say whether a point has fewer bytes and no greater loss, or as many and a smaller loss."""
    name, other, _ = point
    return (other < size and lost[name] <= increase) or (other == size and lost[name] < increase)


def repaired(model: str) -> list[tuple[str, int, dict[str, Any]]]:
    """Return the starts of the healed budgets: name, bytes per token, texts."""
    return [
        (
            f"{asked_words(row['asked'])}, repaired",
            row["bytes_per_token"],
            row["training_free"],
        )
        for row in results(f"healing-targets-{model}-bits")["rows"]
    ]


def increase(texts: dict[str, Any], base: dict[str, Any]) -> float:
    """Return the mean increase of the loss over both texts, as a ratio of perplexities."""
    ratios = (texts[name]["perplexity"] / base[name]["perplexity"] for name in TEXTS)
    return math.expm1(sum(map(math.log, ratios)) / len(TEXTS))


def figures(texts: dict[str, Any]) -> str:
    """Return both perplexities."""
    return " / ".join(f"{texts[name]['perplexity']:.2f}" for name in TEXTS)


def quantizers(model: str) -> Table:
    """Show the divergence that each quantiser adds, by what it packs, its bits and rotation."""
    cells: dict[tuple[str, str], dict[tuple[str, str], str]] = {}
    for row in results(f"quantizers-chosen-{model}")["rows"]:
        *latents, part, scheme, bits, turned, _, _ = row["row"].split()
        kl = sum(text["kl"] for text in row["texts"].values()) / len(row["texts"])
        where = f"{' '.join(latents)}, {PARTS[part]}"
        cells.setdefault((where, bits), {})[scheme, turned] = f"{kl:.5f}"
    ways = [(scheme, turned) for scheme in SCHEMES for turned in ("plain", "rotated")]
    rows = [(*key, *(found.get(way, "") for way in ways)) for key, found in cells.items()]
    names = (f"{scheme.replace('_', ' ')}, {turned}" for scheme, turned in ways)
    return Table("", ("what is packed", "bits", *names), tuple(rows), words=1)


TABLES: dict[str, Callable[[], Table]] = {
    "bits-pythia": lambda: frontier("pythia-70m-standin"),
    "bits-llama": lambda: frontier("llama-32m-standin"),
    "quantizers-pythia": lambda: quantizers("pythia-70m-standin"),
    "quantizers-llama": lambda: quantizers("llama-32m-standin"),
}
