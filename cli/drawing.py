"""The file that a command draws into."""

from __future__ import annotations

from pathlib import Path

from vdcompress.errors import UsageError


def require_writable(output: Path | None, *, force: bool) -> None:
    """Raise before the work what would stop the drawing after it.

    Raises:
        UsageError: the file exists, is no PNG by its name, or has no folder to lie in.
    """
    if output is None:
        return
    if output.suffix.lower() != ".png":
        raise UsageError(f"{output} is drawn as a PNG", f"name it {output.with_suffix('.png')}")
    if output.is_dir() or (output.exists() and not force):
        raise UsageError(f"{output} exists already", "choose another file, or add --force")
    if not output.parent.is_dir():
        raise UsageError(f"there is no folder {output.parent}", "make it first")
