"""Trackers that Trainer reports to, such as TensorBoard: whether they exist, where they write."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

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
def logging_to(folder: Path) -> Iterator[None]:
    """Let trackers that write files write them into a folder, unless their variables say where."""
    unset = [name for name in _FOLDERS if name not in os.environ]
    os.environ.update(dict.fromkeys(unset, str(folder)))
    try:
        yield
    finally:
        for name in unset:
            os.environ.pop(name, None)
