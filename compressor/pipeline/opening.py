"""Open the base that a run came from."""

from __future__ import annotations

from vdcompress.artifact import Compressed
from vdcompress.load import Base, load


def open_base_of(compressed: Compressed, device: str = "cpu") -> Base:
    """Load the model that a run was made from.

    Raises:
        ModelError: it is not where it was.
    """
    return load(compressed.base_id, revision=compressed.base_revision, device=device)
