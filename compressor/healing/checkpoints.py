"""Checkpoints that are either complete or not there, for a finetune that may be killed."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from vdcompress.errors import RunError
from vdcompress.events import OnEvent, Warned, ignore

IDENTITY = "heal.json"
SEAL = "complete.json"
KEPT = 2


def claim(folder: Path, identity: dict[str, Any], *, resume: bool) -> None:
    """Note whose checkpoints a folder is for, or see that they are this run's own.

    Args:
        folder: made if need be.
        identity: what must be equal for a resumed run to continue exactly, as plain values.
        resume: checkpoints may lie there already.

    Raises:
        RunError: checkpoints lie there and should not, or they are of another run.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any_in(folder):
            if not resume:
                raise RunError(f"{folder} has checkpoints already", "resume, or take a new folder")
            _compare(identity_of(folder), identity, folder)
        write_atomically(folder / IDENTITY, json.dumps(identity, indent=1))
    except (OSError, ValueError) as error:
        raise RunError(f"cannot use {folder} for checkpoints: {error}") from error


def identity_of(folder: Path) -> dict[str, Any]:
    """Read whose checkpoints lie in a folder.

    Raises:
        RunError: nothing readable says it.
    """
    try:
        found: dict[str, Any] = json.loads((folder / IDENTITY).read_text())
    except (OSError, ValueError) as error:
        raise RunError(
            f"the checkpoints in {folder} have no readable {IDENTITY}: {error}",
            "nothing says whose they are: delete the folder and start again",
        ) from error
    return found


def _compare(before: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    differ = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    if differ:
        raise RunError(
            f"the checkpoints in {folder} are of another run: {', '.join(differ)} differ",
            "resume with the same settings and data, or start a new run",
        )


def seal(checkpoint: Path) -> None:
    """Mark a checkpoint as complete: the digests of all its files, written last and atomically."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    digests = {path.relative_to(checkpoint).as_posix(): _digest(path) for path in files}
    write_atomically(checkpoint / SEAL, json.dumps(digests, indent=1))


def is_complete(checkpoint: Path) -> bool:
    """Say whether a checkpoint was sealed and none of its files changed since."""
    try:
        digests = json.loads((checkpoint / SEAL).read_text())
        return all(_digest(checkpoint / name) == digest for name, digest in digests.items())
    except (OSError, ValueError, AttributeError):
        return False


def newest(folder: Path, on_event: OnEvent = ignore) -> Path | None:
    """Return the complete checkpoint of the most steps; incomplete ones after it are removed.

    ``on_event`` is warned of those that were complete once.
    """
    for checkpoint in reversed(_all(folder)):
        if is_complete(checkpoint):
            return checkpoint
        if (checkpoint / SEAL).exists():
            on_event(Warned(f"{checkpoint} is damaged, and removed"))
        shutil.rmtree(checkpoint)
    return None


def prune(folder: Path) -> None:
    """Remove all but the last :data:`KEPT` checkpoints."""
    for checkpoint in _all(folder)[:-KEPT]:
        shutil.rmtree(checkpoint, ignore_errors=True)


def any_in(folder: Path) -> bool:
    """Say whether the folder has checkpoints, complete or not."""
    return bool(_all(folder))


def write_atomically(path: Path, text: str) -> None:
    """Write a file under another name first, so that it is whole or not there."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(path)


def _all(folder: Path) -> list[Path]:
    """Return the checkpoints, by their number of steps."""
    found = [path for path in folder.glob("checkpoint-*") if path.name[11:].isdigit()]
    return sorted(found, key=lambda path: int(path.name[11:]))


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
