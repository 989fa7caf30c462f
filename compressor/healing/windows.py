"""The sequences that a finetune reads: a tensor, or anything that holds windows of one length."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.utils.data import Dataset

from vdcompress.errors import DataError


@runtime_checkable
class Windows(Protocol):
    """Token windows of one length, in a fixed order.

    Attributes:
        length: tokens of a window.
        digest: of all tokens; equal digests mean equal windows.
    """

    @property
    def length(self) -> int: ...  # noqa: D102

    @property
    def digest(self) -> str: ...  # noqa: D102

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Tensor:
        """Return a window's token ids, int64 [length]."""


class TensorWindows:
    """Windows that lie in memory, int64 [n, length]."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens

    @property
    def length(self) -> int:
        """Tokens of a window."""
        return self.tokens.shape[1]

    @property
    def digest(self) -> str:
        """Of shape and tokens."""
        data = self.tokens.cpu().contiguous().numpy()
        return hashlib.sha256(repr(data.shape).encode() + data.tobytes()).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int, /) -> Tensor:
        """Return a window, [length]."""
        return self.tokens[index]


def windows_of(given: Tensor | Windows, role: str) -> Windows:
    """Return a tensor [n, length] as windows, and windows as they are.

    Args:
        given: at least one window of at least two tokens.
        role: what they are for, for the error.

    Raises:
        DataError: there are none, or they are too short to predict anything.
    """
    shape = list(given.shape) if isinstance(given, Tensor) else [len(given), given.length]
    if len(shape) != 2 or shape[0] < 1 or shape[1] < 2:
        raise DataError(
            f"no {role} windows: their shape is {shape}",
            "give at least one window of at least two tokens",
        )
    return TensorWindows(given) if isinstance(given, Tensor) else given


def rows(windows: Windows, indices: Sequence[int]) -> Tensor:
    """Return some windows, int64 [len(indices), length]."""
    if isinstance(windows, TensorWindows):
        return windows.tokens[list(indices)]
    return torch.stack([windows[index] for index in indices])


class Batches(Dataset[Tensor]):
    """The first windows as a data set that gives whole batches at once."""

    def __init__(self, windows: Windows, count: int) -> None:
        self.windows = windows
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Tensor:
        """Return a window, [length]."""
        return self.windows[index]

    def __getitems__(self, indices: list[int]) -> Tensor:
        """Return a batch, [b, length]."""
        return rows(self.windows, indices)


def collate(batch: Any) -> dict[str, Tensor]:
    """Name a batch, a tensor [b, length], as the model's input; one that has names keeps them."""
    return batch if isinstance(batch, dict) else {"input_ids": batch}
