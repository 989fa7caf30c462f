"""The processes that a launcher (torchrun, ``accelerate launch``) started: what they share.

Everything works alike in a single process, where there is nothing to wait for. Who is the main one
is known without importing torch, so that the others can keep quiet from the start.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

Value = TypeVar("Value")
_PATIENCE = timedelta(hours=2)  # the main process may read text and measure in the meantime


def count() -> int:
    """Return how many processes the launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1


def rank() -> int:
    """Return this process's number, from 0."""
    return int(os.environ.get("RANK", "0")) if count() > 1 else 0


def is_main() -> bool:
    """Say whether this process prints and writes files."""
    return rank() == 0


def begin(device: str) -> None:
    """Join the other processes; each gets a device of the kind for its own.

    Args:
        device: ``cpu``, or one of a kind that accelerate knows; ``cuda`` then means this process's.
    """
    if count() > 1:
        from accelerate import PartialState

        PartialState(cpu=device == "cpu", timeout=_PATIENCE)


def end() -> None:
    """Leave the other processes; what follows concerns the main one alone."""
    if _joined():
        import torch

        torch.distributed.destroy_process_group()


def wait() -> None:
    """Return when all processes have come here."""
    if _joined():
        import torch

        torch.distributed.barrier()


def shared(make: Callable[[], Value]) -> Value:
    """Return to all processes what the main one makes; its exception is raised by all.

    Args:
        make: called by the main process only; what it returns or raises can be pickled.
    """
    if not _joined():
        return make()
    import torch

    found: list[tuple[Value | None, BaseException | None]] = [(None, None)]
    if is_main():
        try:
            found = [(make(), None)]
        except Exception as error:
            found = [(None, error)]
    torch.distributed.broadcast_object_list(found, src=0)
    value, failure = found[0]
    if failure is not None:
        raise failure
    return value  # type: ignore[return-value]


def gathered(value: Value) -> list[Value]:
    """Return each process's value to all, by number; it can be pickled."""
    if not _joined():
        return [value]
    import torch

    found: list[Any] = [None] * count()
    torch.distributed.all_gather_object(found, value)
    return found


def added(values: Tensor) -> Tensor:
    """Return the sum of a tensor over all processes."""
    if not _joined():
        return values
    import torch

    total = values.clone()
    torch.distributed.all_reduce(total)
    return total


def _joined() -> bool:
    if count() == 1:
        return False
    import torch

    return torch.distributed.is_available() and torch.distributed.is_initialized()
