"""Memory for a cache on a CPU, in pages of 2 MB where the system lends such.

A step of decoding reads all of a cache once and little twice, so a processor that looks up each
page of 4 kB waits for these looks, most of all in a virtual machine, where one is two. Linux gives
large pages to whoever asks for them (``madvise(2)``), or to all, or to nobody.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

WORTH_BYTES = 2**22  # two pages, of which one at least is whole


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a tensor whose numbers nobody has written, as ``torch.empty`` does."""
    size = torch.Size(shape)
    nbytes = size.numel() * dtype.itemsize
    if device.type == "cpu" and nbytes >= WORTH_BYTES and hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # of a system without, or of one without memory
            memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            memory.madvise(mmap.MADV_HUGEPAGE)
            return torch.frombuffer(memory, dtype=dtype).view(size)
    return torch.empty(size, dtype=dtype, device=device)
