"""The most memory that work held, and what is free."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vdcompress import memory, peak_memory
from vdcompress.peak_memory import PeakMemory, free_memory

MEGABYTE = 2**20


def test_the_peak_is_what_was_held_at_once() -> None:
    peak = PeakMemory("cpu")
    kept = torch.ones(60 * MEGABYTE, dtype=torch.uint8)
    peak.restart()
    if peak.before is None:
        pytest.skip("the system does not let the peak be set back")
    passing = torch.ones(100 * MEGABYTE, dtype=torch.uint8)
    del passing
    after = torch.ones(20 * MEGABYTE, dtype=torch.uint8)

    found = peak.above_start()

    assert found is not None
    assert 150 * MEGABYTE < found < 200 * MEGABYTE
    peak.restart()
    again = peak.above_start()
    assert again is not None
    assert again < 120 * MEGABYTE
    assert int(kept[0] + after[0]) == 2


def test_what_was_freed_before_is_not_part_of_it() -> None:
    """The C library keeps what lies between pieces in use."""
    peak = PeakMemory("cpu")
    pieces = [torch.ones(100_000, dtype=torch.uint8) for _ in range(600)]
    del pieces[::2]
    peak.restart()
    found = peak.above_start()
    if found is None or memory._trim() is None:
        pytest.skip("the system does not let the peak be set back, or freed memory be given back")
    assert 25 * MEGABYTE < found < 45 * MEGABYTE
    assert len(pieces) == 300


def test_a_peak_that_cannot_be_known_is_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(peak_memory, "STATUS", tmp_path / "absent")
    assert PeakMemory("cpu").above_start() is None
    monkeypatch.undo()
    monkeypatch.setattr(peak_memory, "CLEAR", tmp_path / "no" / "folder")
    peak = PeakMemory("cpu")
    peak.restart()
    assert peak.above_start() is None
    assert PeakMemory("mps").above_start() is None


def test_some_memory_is_free() -> None:
    assert 0 < free_memory("cpu") < 2**50
