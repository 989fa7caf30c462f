"""Trackers that Trainer reports to, such as TensorBoard: whether they exist, where they write."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vdcompress.errors import UsageError, did_you_mean

_FOLDERS = ("TENSORBOARD_LOGGING_DIR", "TRACKIO_DIR", "WANDB_DIR")


def require(names: Sequence[str]) -> None:
    """See that Trainer knows these trackers and that their packages are installed.

    Raises:
        UsageError: naming the first one that it does not, or that is missing.
    """
    if not names:
        return
    from transformers.integrations.integration_utils import (
        INTEGRATION_TO_CALLBACK,
        get_available_reporting_integrations,
    )

    for name in names:
        if name not in INTEGRATION_TO_CALLBACK:
            raise UsageError(
                f"no tracker {name!r} to report to: {did_you_mean(name, INTEGRATION_TO_CALLBACK)}"
            )
        if name not in get_available_reporting_integrations():
            raise UsageError(f"reporting to {name} needs its package", f"try: pip install {name}")


@contextmanager
def logging_to(folder: Path, names: Sequence[str]) -> Iterator[None]:
    """Let trackers that write files write them into a folder, unless their variables say where.

    Args:
        folder: made if need be.
        names: of the trackers; without any nothing is done.
    """
    if not names:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    unset = [name for name in _FOLDERS if name not in os.environ]
    os.environ.update(dict.fromkeys(unset, str(folder)))
    callers_own = _wandb_run()
    try:
        yield
    finally:
        if callers_own is None and (ours := _wandb_run()) is not None:
            ours.finish()  # Trainer leaves that to the end of the process, when files have moved
        for name in unset:
            os.environ.pop(name, None)


def _wandb_run() -> Any:
    return getattr(sys.modules.get("wandb"), "run", None)
