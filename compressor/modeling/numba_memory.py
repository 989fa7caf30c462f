"""Numbers at an address in numba's kernels: an array that Python makes costs a kernel more.

What is read from memory is asked for ahead: a processor that reads rows of several tokens side by
side, or unpacks between two reads, does so too late by itself.
"""

from __future__ import annotations

from typing import Any

from .numba_compiled import compiled

try:
    from llvmlite import ir
    from numba import carray, types
    from numba.core import cgutils
    from numba.extending import intrinsic
except ImportError as missing:
    raise ImportError("the package numba is not installed, or too old for numpy") from missing

LINE = 64  # bytes that memory gives at once


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


@intrinsic
def _fetch(_context, address):
    """Ask for the line of memory that an address is in; one that is nobody's does no harm."""

    def codegen(context, builder, _signature, arguments):
        byte, flag = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, flag, flag, flag])
        fetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        flags = [ir.Constant(flag, number) for number in (0, 3, 1)]  # to read, to keep near, data
        builder.call(fetch, [builder.inttoptr(arguments[0], byte), *flags])
        return context.get_dummy_value()

    return types.void(address), codegen


@compiled(inline="always")
def fetch(ahead, first, count):
    """Ask for the memory of tokens ``first`` and so many after it.

    ``ahead`` is the address of token 0, and the bytes of each; none are asked for if these are 0.
    """
    begin, size = ahead
    for address in range(begin + first * size, begin + (first + count) * size, LINE):
        _fetch(address)
