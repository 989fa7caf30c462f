"""Runs of float32 numbers side by side in numba's kernels, for what LLVM finds no good form of.

A kernel's rows are short and of a length that is known when it runs, so a loop over one that LLVM
makes wide leaves half of it to its narrow end. Here the code says how wide: ``lanes(x, i, 8)``
are 8 numbers from ``x[i]`` on, 4 is half of them, and 1 is a number. What is stored may be float32,
a bfloat16 as uint16, a code of 8 bits as uint8, or two codes of 4 bits as int8: the low and the
high half of a byte.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

try:
    from llvmlite import binding, ir
    from numba import types
    from numba.core import cgutils
    from numba.extending import intrinsic, models, register_model
except ImportError as missing:
    raise ImportError("the package numba is not installed, or too old for numpy") from missing

FLOAT, WORD = ir.FloatType(), ir.IntType(32)
ANY_ORDER = ("reassoc", "contract", "nsz")
WIDEST = 16 if binding.get_host_cpu_features().get("avx512f") else 8  # of this processor


class Lanes(types.Type):
    """The type of so many float32 numbers side by side."""

    def __init__(self, lanes: int) -> None:
        self.lanes = lanes
        super().__init__(f"Lanes({lanes})")


@register_model(Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager: Any, lanes: Lanes) -> None:
        super().__init__(manager, lanes, vector_of(FLOAT, lanes.lanes))


def vector_of(one: Any, width: int) -> Any:
    """Return LLVM's type of so many values of a type; of one, that type."""
    return one if width == 1 else ir.VectorType(one, width)


def _type(count: types.IntegerLiteral) -> Any:
    return types.float32 if count.literal_value == 1 else Lanes(count.literal_value)


def splat(one: Any, number: float, width: int) -> Any:
    """Return a constant so many times side by side."""
    return ir.Constant(vector_of(one, width), number if width == 1 else [number] * width)


def _repeated(builder: Any, one: Any, number: Any, width: int) -> Any:
    """Return a number, whose type is ``one``, so many times side by side."""
    if width == 1:
        return number
    nothing = ir.Constant(vector_of(one, width), ir.Undefined)
    first = builder.insert_element(nothing, number, ir.Constant(WORD, 0))
    return builder.shuffle_vector(first, nothing, splat(WORD, 0, width))


def _place(context: Any, builder: Any, array: Any, arguments: Any, width: int) -> Any:
    """Return the address of ``x[i]``, the first arguments, and of what follows it."""
    data = context.make_array(array)(context, builder, arguments[0]).data
    stored = vector_of(context.get_data_type(array.dtype), width)
    return builder.bitcast(builder.gep(data, [arguments[1]]), stored.as_pointer())


def _loaded(context: Any, builder: Any, array: Any, arguments: Any, width: int) -> Any:
    """Return what is stored from ``x[i]`` on."""
    place = _place(context, builder, array, arguments, width)
    return builder.load(place, align=array.dtype.bitwidth // 8)


@intrinsic
def as_number(_context, stored):
    """Return one that is stored, but for two codes in a byte, as float32."""

    def codegen(_target, builder, _signature, arguments):
        return _widened(builder, stored, arguments[0], 1)

    return types.float32(stored), codegen


def _widened(builder: Any, stored: Any, found: Any, width: int) -> Any:
    """Return numbers, or low codes, of what is stored."""
    if stored == types.float32:
        return found
    word = builder.zext(found, vector_of(WORD, width))
    if stored == types.uint16:
        return builder.bitcast(builder.shl(word, splat(WORD, 16, width)), vector_of(FLOAT, width))
    if stored == types.int8:
        word = builder.and_(word, splat(WORD, 15, width))
    return builder.uitofp(word, vector_of(FLOAT, width))


@intrinsic(prefer_literal=True)
def lanes(_context, x, i, count):
    """Return numbers from ``x[i]`` on; of bytes that hold two codes the low ones."""

    def codegen(context, builder, _signature, arguments):
        width = count.literal_value
        found = _loaded(context, builder, x, arguments, width)
        return _widened(builder, x.dtype, found, width)

    return _type(count)(x, types.intp, count), codegen


@intrinsic(prefer_literal=True)
def high_lanes(_context, x, i, count):
    """Return the high codes of bytes that hold two, from ``x[i]`` on."""

    def codegen(context, builder, _signature, arguments):
        width = count.literal_value
        found = _loaded(context, builder, x, arguments, width)
        word = builder.lshr(builder.zext(found, vector_of(WORD, width)), splat(WORD, 4, width))
        return builder.uitofp(word, vector_of(FLOAT, width))

    return _type(count)(x, types.intp, count), codegen


@intrinsic
def holds_two(_context, x):
    """Return whether each byte of an array holds two codes; known when compiling."""

    def codegen(_target, _builder, _signature, _arguments):
        return ir.Constant(ir.IntType(1), int(x.dtype == types.int8))

    return types.boolean(x), codegen


@intrinsic(prefer_literal=True)
def unpacked(_context, word, bits, count):
    """Return codes of so many bits that follow each other in a word, uint32, from its lowest on."""

    def codegen(_target, builder, _signature, arguments):
        width, own = count.literal_value, bits.literal_value
        words = _repeated(builder, WORD, arguments[0], width)
        shifts = ir.Constant(vector_of(WORD, width), [own * lane for lane in range(width)])
        codes = builder.and_(builder.lshr(words, shifts), splat(WORD, 2**own - 1, width))
        return builder.uitofp(codes, vector_of(FLOAT, width))

    return _type(count)(types.uint32, bits, count), codegen


@intrinsic(prefer_literal=True)
def spread(_context, number, count):
    """Return one number so many times side by side."""

    def codegen(_target, builder, _signature, arguments):
        return _repeated(builder, FLOAT, arguments[0], count.literal_value)

    return _type(count)(types.float32, count), codegen


@intrinsic(prefer_literal=True)
def wider(_context, x, count):
    """Return numbers with zeros behind, so many in all."""

    def codegen(_target, builder, _signature, arguments):
        had, width = x.lanes, count.literal_value
        if had == width:
            return arguments[0]
        zeros = splat(FLOAT, 0.0, had)
        places = ir.Constant(vector_of(WORD, width), [min(lane, had) for lane in range(width)])
        return builder.shuffle_vector(arguments[0], zeros, places)

    return Lanes(count.literal_value)(x, count), codegen


@intrinsic
def added(_context, a, b, to):
    """Return ``a * b + to``."""

    def codegen(_target, builder, _signature, arguments):
        product = builder.fmul(arguments[0], arguments[1], flags=ANY_ORDER)
        return builder.fadd(product, arguments[2], flags=ANY_ORDER)

    return a(a, a, a), codegen


@intrinsic
def powers_of_two(_context, x, curve):
    """Return two to the power of numbers that are 0 or less; 0 below -126, and NaN of NaN.

    ``curve`` are the coefficients of two to the power of 0 to 1, the highest last.
    """

    def codegen(_target, builder, _signature, arguments):
        width = getattr(x, "lanes", 1)
        wide, words = vector_of(FLOAT, width), vector_of(WORD, width)
        least, own = splat(FLOAT, -126.0, width), arguments[0]
        inside = builder.fcmp_ordered(">", own, least)
        kept = builder.select(inside, own, least)
        name = "llvm.floor.f32" if width == 1 else f"llvm.floor.v{width}f32"
        kind = ir.FunctionType(wide, [wide])
        whole = builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [kept])
        rest = builder.fsub(kept, whole)
        *lower, found = [
            _repeated(builder, FLOAT, builder.extract_value(arguments[1], index), width)
            for index in range(len(curve))
        ]
        for coefficient in reversed(lower):
            product = builder.fmul(found, rest, flags=ANY_ORDER)
            found = builder.fadd(product, coefficient, flags=ANY_ORDER)
        power = builder.add(builder.fptosi(whole, words), splat(WORD, 127, width))
        scale = builder.bitcast(builder.shl(power, splat(WORD, 23, width)), wide)
        nothing = builder.fmul(own, splat(FLOAT, 0.0, width))
        return builder.select(inside, builder.fmul(found, scale), nothing)

    return x(x, curve), codegen


@intrinsic
def higher(_context, a, b):
    """Return the higher ones of numbers side by side; NaN is not."""

    def codegen(_target, builder, _signature, arguments):
        return builder.select(builder.fcmp_ordered(">", *arguments), *arguments)

    return a(a, a), codegen


@intrinsic
def highest_of(_context, x):
    """Return the highest of numbers side by side."""

    def codegen(_target, builder, _signature, arguments):
        wide = vector_of(FLOAT, x.lanes)
        name, kind = f"llvm.vector.reduce.fmax.v{x.lanes}f32", ir.FunctionType(FLOAT, [wide])
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)

    return types.float32(x), codegen


@intrinsic
def sum_of(_context, x):
    """Return the sum of numbers side by side."""

    def codegen(_target, builder, _signature, arguments):
        if x == types.float32:
            return arguments[0]
        wide = vector_of(FLOAT, x.lanes)
        name = f"llvm.vector.reduce.fadd.v{x.lanes}f32"
        kind = ir.FunctionType(FLOAT, [FLOAT, wide])
        reduce = cgutils.get_or_insert_function(builder.module, kind, name)
        return builder.call(reduce, [ir.Constant(FLOAT, -0.0), arguments[0]], fastmath=ANY_ORDER)

    return types.float32(x), codegen


@intrinsic(prefer_literal=True)
def keep(_context, x, i, wide, count):
    """Write numbers that are side by side to ``x[i]`` and after it."""

    def codegen(context, builder, _signature, arguments):
        place = _place(context, builder, x, arguments, count.literal_value)
        builder.store(arguments[2], place, align=4)
        return context.get_dummy_value()

    return types.void(x, types.intp, _type(count), count), codegen


@intrinsic(prefer_literal=True)
def keep_upper(_context, x, i, wide, count):
    """Write the upper halves of numbers, which are bfloat16 ones, to ``x[i]``, uint16, and on."""

    def codegen(context, builder, _signature, arguments):
        width = count.literal_value
        bits = builder.bitcast(arguments[2], vector_of(WORD, width))
        bits = builder.lshr(bits, splat(WORD, 16, width))
        place = _place(context, builder, x, arguments, width)
        builder.store(builder.trunc(bits, vector_of(ir.IntType(16), width)), place, align=2)
        return context.get_dummy_value()

    return types.void(x, types.intp, _type(count), count), codegen


@intrinsic
def eight_sums(_context, eight):
    """Return the sums of eight runs of numbers, side by side; runs are 8 or 16 numbers."""

    def codegen(_target, builder, _signature, arguments):
        runs = [builder.extract_value(arguments[0], index) for index in range(8)]
        while len(runs) > 1:
            runs = [_halved(builder, *runs[i : i + 2]) for i in range(0, len(runs), 2)]
        found = runs[0]
        return found if eight.dtype.lanes == 8 else _halved(builder, found)

    return Lanes(8)(eight), codegen


def _halved(builder: Any, one: Any, other: Any = None) -> Any:
    """Return the sums of numbers two by two, of one run and then of another."""
    width = one.type.count * (1 if other is None else 2)
    other = ir.Constant(one.type, ir.Undefined) if other is None else other
    even, odd = (
        builder.shuffle_vector(one, other, ir.Constant(vector_of(WORD, width // 2), list(lanes_of)))
        for lanes_of in (range(0, width, 2), range(1, width, 2))
    )
    return builder.fadd(even, odd, flags=ANY_ORDER)


def _pairs(context: Any, builder: Any, array: Any, arguments: Any) -> Iterator[tuple[Any, Any]]:
    """Yield the pairs of eight numbers, and the addresses from ``x[i]`` on, a stride apart."""
    _, i, stride, eight = arguments
    for pair in range(4):
        where = [arguments[0], builder.add(i, builder.mul(stride, ir.Constant(stride.type, pair)))]
        two = ir.Constant(vector_of(WORD, 2), [2 * pair, 2 * pair + 1])
        yield builder.shuffle_vector(eight, eight, two), _place(context, builder, array, where, 2)


@intrinsic
def keep_pairs(_context, x, i, stride, eight):
    """Write eight numbers, two by two, to ``x[i]``, ``x[i + stride]`` and so on."""

    def codegen(context, builder, _signature, arguments):
        for pair, place in _pairs(context, builder, x, arguments):
            builder.store(pair, place, align=4)
        return context.get_dummy_value()

    return types.void(x, types.intp, types.intp, eight), codegen


@intrinsic
def add_pairs(_context, x, i, stride, eight):
    """Add eight numbers likewise."""

    def codegen(context, builder, _signature, arguments):
        for pair, place in _pairs(context, builder, x, arguments):
            found = builder.fadd(builder.load(place, align=4), pair, flags=ANY_ORDER)
            builder.store(found, place, align=4)
        return context.get_dummy_value()

    return types.void(x, types.intp, types.intp, eight), codegen
