"""The teacher's likeliest next tokens on disk, computed once: distilling then needs no teacher.

One file of records, one per window in order: ``ids`` [length - 1, k] (uint16 where the vocabulary
allows, else uint32) and ``logprobs`` [length - 1, k + 1] (float16), the last of which is the mass
of all other tokens together (``top_k.py`` says what for). ``<name>.json`` beside it is its seal:
what it was computed from, and its digest. Without a seal that fits, there is no cache.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from vdcompress.errors import RunError
from vdcompress.healing.windows import Windows, rows

VERSION = 1


@dataclass(frozen=True)
class TopKIdentity:
    """What a cache was computed from; another one's is refused.

    Attributes:
        k: tokens kept.
        count: windows.
        length: tokens of a window; all but the last predict one.
        vocabulary: tokens that the teacher knows.
        temperature: divided the teacher's logits.
        bf16: the teacher computed in bfloat16.
        data: digest of the windows.
        teacher: digest of the teacher's weights.
        version: of the format.
    """

    k: int
    count: int
    length: int
    vocabulary: int
    temperature: float
    bf16: bool
    data: str
    teacher: str
    version: int = VERSION

    @property
    def record(self) -> np.dtype[Any]:
        """The numbers of one window."""
        ids = np.uint16 if self.vocabulary <= 2**16 else np.uint32
        tokens = self.length - 1
        return np.dtype(
            [("ids", ids, (tokens, self.k)), ("logprobs", np.float16, (tokens, self.k + 1))]
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the file: about ``count * (length - 1) * 4 * k`` below 65,537 tokens."""
        return self.count * self.record.itemsize


class TopK(Dataset[dict[str, Tensor]]):
    """Training windows with their teacher's likeliest next tokens, read from disk as needed.

    Items: ``input_ids`` [length], ``top_ids`` int32 [length - 1, k] and ``top_logprobs`` float16
    [length - 1, k + 1], the last for all other tokens together.

    Args:
        windows: those that the file was written for.
        path: the file.
        identity: what it must have been computed from, as :func:`write_top_k` returns it.

    Raises:
        RunError: it is not there, incomplete, damaged, or computed from something else.
    """

    def __init__(self, windows: Windows, path: Path, identity: TopKIdentity) -> None:
        seal = check_identity(path, identity)
        if path.stat().st_size != identity.nbytes or file_digest(path) != seal.get("digest"):
            raise RunError(f"{path} is damaged", "remove it, so that it is written again")
        self.windows = windows
        self.path = path
        self.identity = identity
        self._records: np.memmap[Any, Any] | None = None

    def __len__(self) -> int:
        return self.identity.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: value[0] for name, value in self.__getitems__([index]).items()}

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """Return a batch: the items' tensors, stacked."""
        if self._records is None:  # in each worker of a DataLoader its own
            self._records = np.memmap(self.path, self.identity.record, "r", shape=len(self))
        found = self._records[indices]
        return {
            "input_ids": rows(self.windows, indices),
            "top_ids": torch.from_numpy(found["ids"].astype(np.int32)),
            "top_logprobs": torch.from_numpy(np.ascontiguousarray(found["logprobs"])),
        }

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_records": None}


def check_identity(path: Path, identity: TopKIdentity) -> dict[str, Any]:
    """Return a file's seal, or raise a :class:`RunError` if it is not of this identity."""
    known, wanted = sealed(path), asdict(identity)
    if known is None or not path.exists():
        raise RunError(f"{path} is no complete cache of a teacher", "write it again")
    differ = sorted(key for key in wanted if known.get(key) != wanted[key])
    if differ:
        raise RunError(
            f"{path} was computed from something else: {', '.join(differ)} differ",
            "take another file, or remove this one",
        )
    return known


def sealed(path: Path) -> dict[str, Any] | None:
    """Return what the seal of a file says, None without one."""
    try:
        found = json.loads(seal_path(path).read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def seal_path(path: Path) -> Path:
    """Return where the seal of a file is."""
    return path.with_name(path.name + ".json")


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
