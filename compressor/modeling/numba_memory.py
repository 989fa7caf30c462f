"""Numbers at an address in numba's kernels: an array that Python makes costs a kernel more."""

from __future__ import annotations

from typing import Any

from .numba_compiled import compiled

try:
    from numba import carray, types
    from numba.extending import intrinsic
except ImportError as missing:
    raise ImportError("the package numba is not installed, or too old for numpy") from missing


@intrinsic
def _pointer(_context, address, dtype):
    """Return an address, int64, as that of numbers of a dtype."""

    def codegen(context, builder, signature, arguments):
        kind: Any = context.get_value_type(signature.return_type)
        return builder.inttoptr(arguments[0], kind)

    return types.CPointer(dtype.dtype)(address, dtype), codegen


@compiled(inline="always")
def numbers_at(address, count, dtype):
    """Return so many numbers of a dtype that begin at an address; nobody holds them."""
    return carray(_pointer(address, dtype), (count,))
