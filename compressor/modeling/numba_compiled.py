"""How kernels on a CPU are compiled: by numba, once for a machine."""

from __future__ import annotations

import functools
import hashlib
import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from transformers.utils import logging

try:
    import numba
except ImportError as missing:
    raise ImportError("the package numba is not installed, or too old for numpy") from missing

FAST = {"reassoc", "contract", "nsz", "arcp"}  # of fastmath: what is not finite stays so
PATIENCE = 3.0  # seconds without a word
COMPILES = (
    "numba compiles the kernels that read this cache on a CPU: half a minute or more; "
    "the next process finds them"
)
logger = logging.get_logger(__name__)
_met: set[Hashable] = set()


def compiled(signature: str | None = None, **options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Compile a function with numba, once for this machine where a folder can keep it.

    Args:
        signature: of its arguments, compiled at once; without one, of what it is called with.
        options: of numba.
    """
    njit: Any = numba.njit
    options |= {"nogil": True, "error_model": "numpy"}

    def decorate(function: Callable[..., Any]) -> Any:
        try:
            found = njit(cache=True, **options)(function)
        except RuntimeError:  # numba found no folder that it may write to
            return njit(signature, **options)(function)
        cache = getattr(found, "_cache", None)
        _look_at_all_sources(cache)
        _forgive_the_disk(cache)
        if signature:
            found.compile(signature)
            found.disable_compile()
        return found

    return decorate


def _look_at_all_sources(cache: Any) -> None:
    """Let a kernel be compiled anew if a file changed that it calls; numba looks at its own."""
    file: Any = getattr(cache, "_cache_file", None)
    if hasattr(file, "_source_stamp"):
        file._source_stamp = (file._source_stamp, _stamp_of_all())


@functools.cache
def _stamp_of_all() -> str:
    """Return what changes with any of the files that kernels are written in."""
    files = sorted(Path(__file__).parent.glob("numba_*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _forgive_the_disk(cache: Any) -> None:
    """Let a kernel run that was cut off on disk, or has no space there; numba ends the call."""
    if not all(hasattr(cache, name) for name in ("load_overload", "save_overload", "flush")):
        return
    load, save = cache.load_overload, cache.save_overload

    def loaded(*given: Any) -> Any:
        try:
            return load(*given)
        except Exception:  # pickle may raise any
            with suppress(OSError):
                cache.flush()
            return None

    def saved(*given: Any) -> None:
        with suppress(OSError):
            save(*given)

    cache.load_overload, cache.save_overload = loaded, saved


@contextmanager
def said_if_slow(kind: Hashable) -> Iterator[None]:
    """Say that kernels are compiled, if the first call for a kind of arguments takes long."""
    if kind in _met:
        yield
        return
    timer = threading.Timer(PATIENCE, logger.warning, [COMPILES])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
    _met.add(kind)
