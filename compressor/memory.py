"""Memory that was freed, given back to the system."""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from typing import Any


def give_back() -> None:
    """Return freed memory to the system, where the C library would keep it; else do nothing.

    Glibc keeps what lies between pieces in use, and cannot take it again for tensors, which want
    aligned memory: layer after layer loaded and dropped would pile up without this.
    """
    trim = _trim()
    if trim is not None:
        trim(0)


@cache
def _trim() -> Any | None:
    """Return ``malloc_trim`` where there is one."""
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), "malloc_trim", None)
