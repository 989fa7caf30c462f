"""Cells of the tables: what a benchmark wrote, and how its figures are written down."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
TEXTS = ("books_dev", "docs_dev", "wikitext2_valid")


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


def changes(texts: dict[str, Any]) -> str:
    """Return by how much the three perplexities are above the base's."""
    return " / ".join(f"{texts[name]['ratio'] - 1:+.1%}" for name in TEXTS)


def asked_words(asked: dict[str, Any]) -> str:
    """Return a request as its flags."""
    flags = {"target": "for"}
    return " ".join(
        f"--{flags.get(name, name).replace('_', '-')} {value}" for name, value in asked.items()
    )


def held_out_kl(texts: dict[str, Any]) -> str:
    """Return the divergences that choices are made by."""
    return " / ".join(f"{texts[f'held-out {kind}']['kl']:.4f}" for kind in ("books", "docs"))


def held_out(texts: dict[str, Any]) -> str:
    """Return the perplexities that choices are made by."""
    return " / ".join(
        f"{texts[f'held-out {kind}']['perplexity']:.2f}" for kind in ("books", "docs")
    )
