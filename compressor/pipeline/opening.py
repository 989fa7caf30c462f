"""Open a finished run, and the base that it came from."""

from __future__ import annotations

from pathlib import Path

from vdcompress.artifact import Compressed, load_artifact
from vdcompress.load import Base, load
from vdcompress.registration import register


def open_run(run: Path, device: str = "cpu") -> Compressed:
    """Load a run.

    The classes are registered first: where ``transformers`` was imported in another order, its
    import hook may have missed them, and the tokenizer's loader would ask to trust remote code.

    Raises:
        RunError: it is missing or unfinished.
        ModelError: its weights are damaged.
    """
    register()
    return load_artifact(run, device=device)


def open_base_of(compressed: Compressed, device: str = "cpu") -> Base:
    """Load the model that a run was made from.

    Raises:
        ModelError: it is not where it was.
    """
    return load(compressed.base_id, revision=compressed.base_revision, device=device)
