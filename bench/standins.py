"""Where the stand-in checkpoints and their texts are: the folder in ``VDCOMPRESS_STANDINS``."""

from __future__ import annotations

import os
import sys
from pathlib import Path

TEXTS = {
    "books_dev": "books_dev.jsonl",
    "docs_dev": "docs_dev.jsonl",
    "wikitext2_valid": "wikitext2_valid.txt",
}


def folder() -> Path:
    """Return the folder, or say how to name it."""
    name = os.environ.get("VDCOMPRESS_STANDINS")
    if not name or not Path(name).is_dir():
        sys.exit("set VDCOMPRESS_STANDINS to the folder that holds models/ and text/")
    return Path(name)


def model(name: str) -> Path:
    """Return the folder of a checkpoint."""
    return folder() / "models" / name


def text(name: str) -> Path:
    """Return a text that is only for measuring, by its name in :data:`TEXTS`."""
    return folder() / "text" / TEXTS[name]


def training_text() -> Path:
    """Return the text for calibration and finetuning."""
    return folder() / "text" / "train.jsonl.gz"
