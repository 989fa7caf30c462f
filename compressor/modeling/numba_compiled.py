"""How kernels on a CPU are compiled: by numba, once for a machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

try:
    import numba
except ImportError as missing:
    raise ImportError("the package numba is not installed, or too old for numpy") from missing


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
            return njit(signature, cache=True, **options)(function)
        except RuntimeError:  # numba found no folder that it may write to
            return njit(signature, **options)(function)

    return decorate
