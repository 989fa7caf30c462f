"""The token windows that benches calibrate and measure on, tokenised once and kept in one file.

    VDCOMPRESS_STANDINS=... python bench/token_sets.py tokens.npz

A machine with a GPU then needs the checkpoints and this file, named by VDCOMPRESS_TOKENS, no text.
Everything that calibrates is drawn from the training part of the training text; ``held-out books``
and ``held-out docs`` from its held-out part, to choose by; the three texts are only for measuring.
"""

from __future__ import annotations

import gzip
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import standins
import torch

from vdcompress.data.corpus import Source, documents, role_of
from vdcompress.data.windows import draw_windows, tokenise
from vdcompress.load import read_tokenizer

WINDOW, WINDOWS, HELD_OUT_WINDOWS = 2048, 24, 12
BALANCE = 0.5
SIZES, SEEDS, USUAL = (8, 32, 128), (0, 1, 2), 64
CALIBRATION = f"mixed-{USUAL}-seed0"
HELD_OUT = ("held-out books", "held-out docs")
MEASURED = (*standins.TEXTS, *HELD_OUT)


def read() -> dict[str, torch.Tensor]:
    """Return all sets: windows [n, 2048] to calibrate with, tokens [n] to measure on."""
    file = os.environ.get("VDCOMPRESS_TOKENS")
    if not file:
        return make()
    with np.load(file) as found:
        return {name: torch.from_numpy(found[name].astype(np.int64)) for name in found}


def make(usual_only: bool = False) -> dict[str, torch.Tensor]:
    """Tokenise everything; both stand-ins have one tokenizer.

    Args:
        usual_only: leave out the calibration sets of other sizes, seeds and kinds.
    """
    tokenizer = read_tokenizer(standins.model("pythia-70m-standin"))
    sets = {}
    for name in standins.TEXTS:
        text = documents(Source.parse(str(standins.text(name))), "evaluation", whole=True)
        sets[name] = tokenise(text, tokenizer, limit=WINDOWS * WINDOW + 1)
    for kind, name in zip(("book", "doc"), HELD_OUT, strict=True):
        rows = [text[: 8 * WINDOW] for text in _rows(kind, "validation")]
        sets[name] = tokenise(rows, tokenizer, limit=HELD_OUT_WINDOWS * WINDOW + 1)

    def draw(text: Iterator[str], count: int, seed: int) -> torch.Tensor:
        return draw_windows(text, tokenizer, count=count, length=WINDOW, seed=seed, balance=BALANCE)

    source = Source.parse(str(standins.training_text()))
    sets[CALIBRATION] = draw(iter(documents(source, "training")), USUAL, 0)
    if usual_only:
        return sets
    for size in SIZES:
        for seed in SEEDS:
            text = iter(documents(source, "training"))
            sets[f"mixed-{size}-seed{seed}"] = draw(text, size, seed)
    for kind in ("book", "doc"):
        sets[f"{kind}s-{USUAL}-seed0"] = draw(_rows(kind, "training"), USUAL, 0)
    return sets


def _rows(kind: str, role: str) -> Iterator[str]:
    """Yield the training text's documents of one kind and one role."""
    with gzip.open(standins.training_text(), "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            if row["kind"] == kind and role_of(row["text"]) == role:
                yield row["text"]


if __name__ == "__main__":
    made = make()
    np.savez(
        Path(sys.argv[1]), **{name: ids.numpy().astype(np.uint16) for name, ids in made.items()}
    )
    print({name: tuple(ids.shape) for name, ids in made.items()})
