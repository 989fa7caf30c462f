"""Matrices of bfloat16 numbers in a processor's tiles (Intel's AMX), for numba's kernels.

A tile is 16 rows of 64 bytes. ``multiply(to, a, b)`` adds to the float32 numbers of one tile the
product of two others: ``a`` has rows of 32 numbers, ``b`` 16 rows of 16 pairs, each of which holds
what follows each other down a column. Source: Intel 64 and IA-32 Architectures Software Developer's
Manual, volume 2, TDPBF16PS. Where a processor has no tiles, nothing is done; ask :func:`allowed`.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from .numba_compiled import compiled
from .numba_lanes import FLOAT, WORD, splat, vector_of

try:
    import numba
    import numpy as np
    from llvmlite import binding, ir
    from numba import types
    from numba.core import cgutils
    from numba.extending import intrinsic
except ImportError as missing:
    raise ImportError("the package numba is not installed, or too old for numpy") from missing

ROWS, LINE = 16, 64  # of a tile, and bytes of a row
PAIRS = 32  # numbers of a row
KNOWN = not vars(numba.config)["CPU_NAME"] and all(
    binding.get_host_cpu_features().get(feature) for feature in ("amx-tile", "amx-bf16")
)
LEFT, RIGHT, LEFT_END, RIGHT_END = 4, 5, 6, 7  # what tiles hold; those before them have sums
BYTE, HALF = ir.IntType(8), ir.IntType(16)


@cache
def allowed() -> bool:
    """Whether this process may use tiles: it asks the system for it, once."""
    ask = getattr(torch.cpu, "_init_amx", None)
    return KNOWN and ask is not None and bool(ask())


def _call(context: Any, builder: Any, name: str, arguments: list[Any]) -> Any:
    """Call one of LLVM's functions for tiles."""
    if KNOWN:
        kind = ir.FunctionType(ir.VoidType(), [each.type for each in arguments])
        found = cgutils.get_or_insert_function(builder.module, kind, f"llvm.x86.{name}")
        builder.call(found, arguments)
    return context.get_dummy_value()


def _number(tile: types.IntegerLiteral) -> Any:
    return ir.Constant(BYTE, tile.literal_value)


@intrinsic
def _configure(_context, shapes):
    """Take the shapes of all tiles from 64 bytes; the array, not its address, keeps these alive."""

    def codegen(context, builder, _signature, arguments):
        data = context.make_array(shapes)(context, builder, arguments[0]).data
        return _call(context, builder, "ldtilecfg", [data])

    return types.void(shapes), codegen


@intrinsic
def leave_tiles(_context):
    """Give the tiles back, so that nothing of them is kept from thread to thread."""

    def codegen(context, builder, _signature, _arguments):
        return _call(context, builder, "tilerelease", [])

    return types.void(), codegen


def _moved(name: str, tile: Any) -> tuple[Any, Any]:
    """Return what moves the rows of a tile between it and memory."""

    def codegen(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        address = builder.inttoptr(arguments[1], BYTE.as_pointer())
        return _call(context, builder, name, [_number(tile), address, arguments[2]])

    return types.void(tile, types.int64, types.int64), codegen


@intrinsic(prefer_literal=True)
def load_tile(_context, tile, address, stride):
    """Read the rows of a tile, so many bytes from each other."""
    return _moved("tileloadd64", tile)


@intrinsic(prefer_literal=True)
def store_tile(_context, tile, address, stride):
    """Write the rows of a tile likewise."""
    return _moved("tilestored64", tile)


@intrinsic(prefer_literal=True)
def clear_tile(_context, tile):
    """Let a tile hold zeros."""

    def codegen(context, builder, _signature, _arguments):
        return _call(context, builder, "tilezero", [_number(tile)])

    return types.void(tile), codegen


@intrinsic(prefer_literal=True)
def multiply(_context, to, left, right):
    """Add the product of two tiles to a third."""

    def codegen(context, builder, _signature, _arguments):
        return _call(context, builder, "tdpbf16ps", [_number(each) for each in (to, left, right)])

    return types.void(to, left, right), codegen


@intrinsic(prefer_literal=True)
def keep_parts(_context, x, i, high, low, count):
    """Write float32 numbers from ``x[i]`` on as two bfloat16 ones each, whose sum they almost are.

    The first parts go to the address ``high``, the others to ``low``.
    """

    def codegen(context, builder, _signature, arguments):
        width = count.literal_value
        words, numbers, halves = (vector_of(one, width) for one in (WORD, FLOAT, HALF))
        data = context.make_array(x)(context, builder, arguments[0]).data
        place = builder.bitcast(builder.gep(data, [arguments[1]]), numbers.as_pointer())
        found = builder.load(place, align=4)
        bits = builder.bitcast(found, words)
        first = builder.and_(bits, splat(WORD, 0xFFFF0000, width))
        rest = builder.bitcast(builder.fsub(found, builder.bitcast(first, numbers)), words)
        rest = builder.add(rest, splat(WORD, 0x8000, width))
        for part, address in ((first, arguments[2]), (rest, arguments[3])):
            own = builder.trunc(builder.lshr(part, splat(WORD, 16, width)), halves)
            builder.store(own, builder.inttoptr(address, halves.as_pointer()), align=2)
        return context.get_dummy_value()

    return types.void(x, types.intp, types.int64, types.int64, count), codegen


@intrinsic(prefer_literal=True)
def keep_pairs_of(_context, x, one, other, address, count):
    """Write 16-bit numbers from ``x[one]`` and ``x[other]`` on side by side, pair by pair."""

    def codegen(context, builder, _signature, arguments):
        width = count.literal_value
        halves = vector_of(HALF, width)
        data = context.make_array(x)(context, builder, arguments[0]).data
        places = [builder.gep(data, [at]) for at in arguments[1:3]]
        rows = [builder.load(builder.bitcast(p, halves.as_pointer()), align=2) for p in places]
        if width == 1:
            rows = [builder.zext(row, WORD) for row in rows]
            word = builder.or_(rows[0], builder.shl(rows[1], ir.Constant(WORD, 16)))
            builder.store(word, builder.inttoptr(arguments[3], WORD.as_pointer()), align=4)
            return context.get_dummy_value()
        to = builder.inttoptr(arguments[3], halves.as_pointer())
        for half in range(2):
            lanes = [lane for j in range(width // 2) for lane in (j, j + width)]
            own = _picked(builder, *rows, [lane + half * width // 2 for lane in lanes])
            builder.store(own, builder.gep(to, [ir.Constant(WORD, half)]), align=4)
        return context.get_dummy_value()

    return types.void(x, types.intp, types.intp, types.int64, count), codegen


@intrinsic
def keep_turned(_context, address, to, stride):
    """Write a tile of sums by its columns, 8 rows of 16 numbers; a column's two parts are added.

    The tile [16, 2, 8] is at the first address, the rows at the second one, ``stride`` bytes
    from each other.
    """

    def codegen(context, builder, _signature, arguments):
        wide = vector_of(FLOAT, ROWS)
        tile = builder.inttoptr(arguments[0], wide.as_pointer())
        rows = [
            builder.load(builder.gep(tile, [ir.Constant(WORD, t)]), align=4) for t in range(ROWS)
        ]
        low, high = ([*range(at, at + 8), *range(at + 16, at + 24)] for at in (0, 8))
        found = [
            builder.fadd(*(_picked(builder, *rows[t : t + 2], lanes) for lanes in (low, high)))
            for t in range(0, ROWS, 2)
        ]
        for _ in range(4):  # each puts the highest bit of a number's place behind the others
            found = [
                _picked(
                    builder, found[i], found[i + 4], [lane + x for lane in eight for x in (0, 16)]
                )
                for i in range(4)
                for eight in (range(8), range(8, 16))
            ]
        for r, row in enumerate(found):
            place = builder.add(
                arguments[1], builder.mul(arguments[2], ir.Constant(arguments[2].type, r))
            )
            builder.store(row, builder.inttoptr(place, wide.as_pointer()), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), codegen


def _picked(builder: Any, one: Any, other: Any, lanes: list[int]) -> Any:
    return builder.shuffle_vector(one, other, ir.Constant(vector_of(WORD, len(lanes)), lanes))


@compiled()
def lines(count):
    """Return room for words of 4 bytes that begins where a line of memory does.

    It is there as long as its array is used, not its address: ask for that where it is needed.
    """
    room = np.empty(count + LINE // 4, np.uint32)
    first = -room.ctypes.data % LINE // 4
    return room[first : first + count]


@compiled()
def enter_tiles(end):
    """Shape the tiles: all whole, but two for the last numbers, even in number, of a row."""
    shapes = np.zeros(LINE, np.uint8)
    shapes[0] = 1
    for tile in range(8):
        shapes[16 + 2 * tile], shapes[48 + tile] = LINE, ROWS
    if end:
        shapes[16 + 2 * LEFT_END], shapes[48 + RIGHT_END] = 2 * end, end // 2
    _configure(shapes)
