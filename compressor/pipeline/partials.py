"""What a run that is under way leaves on disk, so that it can be continued."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from vdcompress import runs
from vdcompress.artifact import require_free
from vdcompress.errors import RunError
from vdcompress.healing import checkpoints, processes
from vdcompress.recipe import Recipe, parse

LOCK = ".lock"


def claim(output: Path, *, force: bool) -> None:
    """See that a run may be written to ``output``, and that none that would be is under way.

    Raises:
        RunError: it is taken, or a run of that name was interrupted; ``force`` replaces both.
            Another process is writing it; nothing replaces that.
    """
    require_free(output, force=force)
    partial = runs.partial_of(output)
    if _is_written(partial):
        raise _busy(partial)
    if partial.exists() and not force:
        raise RunError(
            f"{partial} holds an interrupted run", f"continue it with: {runs.resuming(partial)}"
        )
    shutil.rmtree(partial, ignore_errors=True)


def save_state(partial: Path, name: str, recipe: Recipe, **more: str) -> None:
    """Write down what ``--resume`` must know: the recipe, and whatever else a command needs."""
    partial.mkdir(parents=True, exist_ok=True)
    state = {"version": 1, **more, "recipe": recipe.model_dump(mode="json")}
    (partial / name).write_text(json.dumps(state, indent=2), encoding="utf-8")


def saved_state(partial: Path, name: str) -> tuple[Recipe, dict[str, Any]]:
    """Read what :func:`save_state` wrote.

    Raises:
        RunError: it is missing or damaged.
    """
    try:
        state = json.loads((partial / name).read_text(encoding="utf-8"))
        return parse(state["recipe"], f"recipe in {partial}"), state
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{partial} cannot be resumed: no readable {name}", "delete it and start again"
        ) from error


@contextmanager
def under_way(partial: Path, *folders: Path) -> Iterator[None]:
    """Let no other program write to ``partial`` while the block makes a run of it.

    At its end nothing of ``partial`` is left; what an interrupted block leaves is kept only if one
    of the folders has a checkpoint. A killed one holds no other up. Processes that train together
    enter together, and the main one removes.

    Raises:
        RunError: another program is writing there, or nothing can be written there.
    """
    lock = FileLock(partial / LOCK)
    processes.shared(lambda: _take(lock, partial))
    try:
        yield
        if processes.is_main():
            shutil.rmtree(partial, ignore_errors=True)
    except BaseException:
        if processes.is_main() and not any(map(checkpoints.newest, folders)):
            shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        lock.release()


def _take(lock: FileLock, partial: Path) -> None:
    try:
        partial.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except Timeout as error:
        raise _busy(partial) from error
    except OSError as error:
        raise RunError(f"cannot write to {partial}: {error.strerror}") from error
    except NotImplementedError:
        pass  # a file system that knows no locks


def _is_written(partial: Path) -> bool:
    """Say whether a program is writing to ``partial`` now."""
    if not (partial / LOCK).exists():
        return False
    try:
        with FileLock(partial / LOCK, blocking=False):
            return False
    except Timeout:
        return True
    except NotImplementedError:
        return False


def _busy(partial: Path) -> RunError:
    return RunError(
        f"{partial} is being written by another process", "wait for it, or stop it first"
    )
