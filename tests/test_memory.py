"""Freed memory goes back to the system."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from vdcompress import memory

PIECE, PIECES = 100_000, 1000


def anonymous_bytes() -> int:
    """Return the memory of this process that no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


@pytest.mark.skipif(memory._trim() is None, reason="the C library has nothing for it")
def test_what_the_c_library_kept_is_given_back() -> None:
    memory.give_back()
    before = anonymous_bytes()
    freed = [torch.ones(PIECE, dtype=torch.uint8) for _ in range(PIECES)]
    kept = torch.ones(PIECE, dtype=torch.uint8)
    del freed
    assert anonymous_bytes() - before > PIECE * PIECES / 2
    memory.give_back()
    assert anonymous_bytes() - before < PIECE * PIECES / 4
    assert kept.sum() == PIECE


def test_systems_without_it_do_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    memory._trim.cache_clear()
    monkeypatch.setattr(sys, "platform", "win32")
    assert memory._trim() is None
    memory.give_back()
    memory._trim.cache_clear()
