"""Write single files whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from vdcompress.errors import ArtifactError


def write(path: Path, data: bytes) -> None:
    """Write a file whole or not at all.

    Raises:
        ArtifactError: the disk is full or the folder cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_bytes(data)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise ArtifactError(
            f"{path} could not be written: {error.strerror or error}",
            "check the folder and the space on its disk",
        ) from error
