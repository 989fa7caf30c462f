"""Large tensors of a cache lie on large pages, where the system lends such."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest
import torch

from vdcompress.modeling import large_pages
from vdcompress.modeling.cache import LatentCache
from vdcompress.modeling.large_pages import WORTH_BYTES, empty

CPU = torch.device("cpu")
SMAPS, SWITCH = Path("/proc/self/smaps"), Path("/sys/kernel/mm/transparent_hugepage/enabled")


def asks_for_large_pages(x: torch.Tensor) -> bool:
    """Whether the memory in the middle of a tensor is marked for large pages."""
    place, inside = x.data_ptr() + x.nbytes // 2, False
    for line in SMAPS.read_text().splitlines():
        head = line.split(maxsplit=1)[0]
        if "-" in head:
            low, high = (int(edge, 16) for edge in head.split("-"))
            inside = low <= place < high
        if inside and head == "VmFlags:":
            return "hg" in line.split()
    raise ValueError("no such memory")


@pytest.mark.skipif(not (SMAPS.exists() and SWITCH.exists()), reason="needs Linux's large pages")
def test_a_large_cache_asks_for_large_pages() -> None:
    cache = LatentCache(1)
    tokens = WORTH_BYTES // (8 * 40 * 4)
    keys, values = cache.update(*[torch.randn(1, 8, tokens + 64, 40)] * 2, 0)

    assert asks_for_large_pages(keys)
    assert asks_for_large_pages(values)
    assert torch.equal(keys, values)


def test_shapes_and_dtypes_are_as_asked() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.uint8):
        large = empty((1, 3, WORTH_BYTES, 1), dtype, CPU)
        assert (large.shape, large.dtype) == ((1, 3, WORTH_BYTES, 1), dtype)
        large.fill_(3)
        assert int(large.sum(dtype=torch.int64)) == 9 * WORTH_BYTES


def test_small_ones_and_other_devices_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large_pages, "mmap", None)

    assert empty((WORTH_BYTES - 1,), torch.uint8, CPU).nbytes == WORTH_BYTES - 1
    assert empty((WORTH_BYTES,), torch.uint8, torch.device("meta")).device.type == "meta"


@pytest.mark.parametrize("missing", ["pages", "memory"])
def test_without_large_pages_there_are_small_ones(
    monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    class Refusing(mmap.mmap):
        def __new__(cls, *args: int, **kwargs: int) -> Refusing:
            if missing == "memory":
                raise OSError
            return super().__new__(cls, *args, **kwargs)

        def madvise(self, *_: int) -> None:
            raise OSError

    monkeypatch.setattr(large_pages.mmap, "mmap", Refusing)

    assert empty((WORTH_BYTES,), torch.uint8, CPU).fill_(1).sum() == WORTH_BYTES
