"""What stored latents stand for: numbers, float32, or levels with the scales beside them.

Codes of 3 and 2 bits are read word by word where each token has one scale, and stay in the order
in which words hold them; all others have the order of the latent. Letters: n tokens, w width.
"""

from __future__ import annotations

from .numba_compiled import FAST, compiled
from .numba_lanes import (
    WIDEST,
    added,
    high_lanes,
    holds_two,
    keep,
    keep_upper,
    lanes,
    spread,
    unpacked,
)
from .numba_memory import numbers_at
from .numba_part import (
    BFLOAT16,
    BITS,
    BLOCKS,
    CHANNEL_FORM,
    FLOAT16,
    FLOAT32,
    FORM,
    NORMAL_FORM,
    ROW,
    TOKEN_FORM,
    TOKENS,
    WIDTH,
)
from .quantizer_normal import CUBICS

try:
    import numpy as np
except ImportError as missing:
    raise ImportError("the package numpy is not installed") from missing

CURVES = np.array([CUBICS.get(bits, (0.0, 0.0)) for bits in range(9)], np.float32)
HALF_UNIT = np.float32(2.0**112)  # an fp16 number over the float32 with its bits shifted


@compiled()
def widen_bfloat16(x, out):
    """Write bfloat16 numbers, uint16, as float32 ones."""
    bits = out.view(np.uint32)
    for j in range(x.shape[0]):
        bits[j] = np.uint32(x[j]) << np.uint32(16)


@compiled()
def widen_float16(x, out):
    """Write fp16 numbers, uint16, as float32 ones.

    A scale of 2 ** 112 makes up for the exponent's other bias, numbers that are not normalised
    included; infinity and NaN, whose exponent is all ones, get the float32's.
    """
    bits = out.view(np.uint32)
    for j in range(x.shape[0]):
        bits[j] = np.uint32(x[j] & np.uint16(0x7FFF)) << np.uint32(13)
    for j in range(x.shape[0]):
        out[j] *= HALF_UNIT
    for j in range(x.shape[0]):
        bits[j] |= np.uint32(x[j] & np.uint16(0x8000)) << np.uint32(16)
    for j in range(x.shape[0]):
        if (x[j] & np.uint16(0x7C00)) == np.uint16(0x7C00):
            bits[j] |= np.uint32(0x7F800000)


@compiled()
def _halves(packed, out):
    """Write codes of 4 bits [n, columns] as numbers [n, 2, columns]."""
    for t in range(out.shape[0]):
        for j in range(out.shape[2]):
            out[t, 0, j] = np.float32(np.uint8(packed[t, j] & np.uint8(15)))
        for j in range(out.shape[2]):
            out[t, 1, j] = np.float32(np.uint8(packed[t, j] >> np.uint8(4)))


@compiled()
def _codes(packed, out, bits):
    """Write codes packed in words [n, bytes, columns] as numbers [n, runs, columns]."""
    mask = np.uint8(2**bits - 1)
    for t in range(out.shape[0]):
        for k in range(out.shape[1]):
            byte, low = k * bits // 8, np.uint8(k * bits % 8)
            if low + bits > 8:
                high = np.uint8(8 - low)
                for j in range(out.shape[2]):
                    one = np.uint8(packed[t, byte, j] >> low)
                    other = np.uint8(packed[t, byte + 1, j] << high)
                    out[t, k, j] = np.float32(np.uint8(np.uint8(one | other) & mask))
            else:
                for j in range(out.shape[2]):
                    code = np.uint8(np.uint8(packed[t, byte, j] >> low) & mask)
                    out[t, k, j] = np.float32(code)


@compiled()
def runs_of(part):
    """Return how many codes a word has of latents that are read word by word, 1 for all others.

    Such are codes of 3 and 2 bits with one scale for each token. In a word they are far apart from
    each other in the latent; queries and sums are put into their order.
    """
    words = part[FORM] in (TOKEN_FORM, NORMAL_FORM) and part[BLOCKS] == 1 and part[BITS] < 4
    if not words:
        return 1
    return 8 if part[BITS] == 3 else 4


@compiled(inline="always")
def _keep_codes(out, i, stored, at, columns, count):
    """Write bytes from ``at`` on as bfloat16 numbers, or where these hold two codes, both."""
    keep_upper(out, i, lanes(stored, at, count), count)
    if holds_two(stored):
        keep_upper(out, i + columns, high_lanes(stored, at, count), count)


@compiled()
def _as_bfloat16(stored, out, row, width):
    """Write rows of codes as bfloat16 numbers, uint16 [n * w]."""
    wide = row // WIDEST * WIDEST
    for t in range(out.shape[0] // width):
        for j in range(0, wide, WIDEST):
            _keep_codes(out, t * width + j, stored, t * row + j, row, WIDEST)
        for j in range(wide, row):
            _keep_codes(out, t * width + j, stored, t * row + j, row, 1)


@compiled()
def read_as_bfloat16(part, address, n, room):
    """Return codes of 8 or 4 bits of n tokens as bfloat16 numbers, uint16 [n * w], in room."""
    width, row = part[WIDTH], part[ROW]
    out = room.view(np.uint16)[: n * width]
    if row == width:
        _as_bfloat16(numbers_at(address, n * row, np.uint8), out, row, width)
    else:
        _as_bfloat16(numbers_at(address, n * row, np.int8), out, row, width)
    return out


@compiled()
def _words(packed, out, runs):
    """Write codes packed in words [n, bytes, columns] as numbers, [n, columns, runs] in a row."""
    columns = packed.shape[2]
    for t in range(packed.shape[0]):
        for j in range(columns):
            word = np.uint32(packed[t, 0, j])
            if runs == 8:
                word |= np.uint32(packed[t, 1, j]) << np.uint32(8)
                word |= np.uint32(packed[t, 2, j]) << np.uint32(16)
                keep(out, (t * columns + j) * 8, unpacked(word, 3, 8), 8)
            else:
                keep(out, (t * columns + j) * 4, unpacked(word, 2, 4), 4)


@compiled()
def read_words(part, at, n, runs, room):
    """Return the levels [n, columns, runs] in a row of n latents that begin at ``at``."""
    row = part[ROW]
    columns = row // 3 if runs == 8 else row
    out = room[: n * columns * runs]
    stored = numbers_at(at, n * row, np.uint8)
    _words(stored.reshape(n, row // columns, columns), out, runs)
    if part[FORM] == NORMAL_FORM:
        _bend(out, part[BITS])
    return out


@compiled()
def _bytes(x, out):
    for j in range(x.shape[0]):
        out[j] = np.float32(x[j])


@compiled(fastmath=FAST)
def _bend(x, bits):
    half, a, b = np.float32((2**bits - 1) / 2), CURVES[bits, 0], CURVES[bits, 1]
    for j in range(x.shape[0]):
        u = x[j] - half
        x[j] = u * (a + b * u * u)


@compiled(fastmath=FAST)
def _by_channel(x, scale, zero, unit):
    for j in range(x.shape[0]):
        x[j] = (x[j] - unit * np.float32(zero[j])) * scale[j]


@compiled(fastmath=FAST)
def read_factors(part, scale_at, zero_at, n, block, scales, zeros):
    """Write the scales and zero points, in levels, of n tokens in one block of dimensions."""
    blocks, bits = part[BLOCKS], scales.view(np.uint32)
    own = numbers_at(scale_at, n * blocks, np.uint16)
    for t in range(n):
        bits[t] = np.uint32(own[t * blocks + block]) << np.uint32(13)
    for t in range(n):
        scales[t] *= HALF_UNIT
    if part[FORM] == TOKEN_FORM:
        unit = np.float32(2.0 ** part[BITS] / 256)
        levels = numbers_at(zero_at, n * blocks, np.uint8)
        for t in range(n):
            zeros[t] = unit * np.float32(levels[t * blocks + block])
    else:
        zeros[:n] = np.float32(0)


@compiled(fastmath=FAST)
def _factors_of_blocks(part, scale_at, zero_at, scales, lost):
    """Write the scales of blocks, and what their zero points take from numbers."""
    bits, own = scales.view(np.uint32), numbers_at(scale_at, scales.shape[0], np.uint16)
    for k in range(scales.shape[0]):
        bits[k] = np.uint32(own[k]) << np.uint32(13)
    for k in range(scales.shape[0]):
        scales[k] *= HALF_UNIT
    if part[FORM] == TOKEN_FORM:
        unit = np.float32(2.0 ** part[BITS] / 256)
        zeros = numbers_at(zero_at, scales.shape[0], np.uint8)
        for k in range(scales.shape[0]):
            lost[k] = scales[k] * (unit * np.float32(zeros[k]))
    else:
        lost[:] = np.float32(0)


@compiled(fastmath=FAST)
def _scale(x, scales, lost):
    """Turn levels [n, D] into numbers, each row by its scale."""
    for k in range(x.shape[0]):
        scale, less = scales[k], lost[k]
        for j in range(x.shape[1]):
            x[k, j] = x[k, j] * scale - less


@compiled(fastmath=FAST, inline="always")
def _write(out, to, codes, scale, less, count):
    keep(out, to, added(codes, spread(scale, count), spread(less, count)), count)


@compiled(fastmath=FAST)
def _scale_bytes(stored, out, size, scales, lost):
    """Write codes of 8 bits as numbers, ``size`` of which have one scale."""
    wide = size // WIDEST * WIDEST
    for k in range(scales.shape[0]):
        scale, less = scales[k], -lost[k]
        for j in range(k * size, k * size + wide, WIDEST):
            _write(out, j, lanes(stored, j, WIDEST), scale, less, WIDEST)
        for j in range(k * size + wide, (k + 1) * size):
            _write(out, j, lanes(stored, j, 1), scale, less, 1)


@compiled(fastmath=FAST)
def _scale_halves(stored, out, row, blocks, size, scales, lost):
    """Write codes of 4 bits, rows of so many bytes, as numbers; a row has so many blocks."""
    for k in range(scales.shape[0]):
        t, first = k // blocks, k % blocks * size
        scale, less, to, at = scales[k], -lost[k], t * blocks * size, t * row
        middle = min(max(first, row), first + size)
        wide = first + (middle - first) // WIDEST * WIDEST
        for j in range(first, wide, WIDEST):
            _write(out, to + j, lanes(stored, at + j, WIDEST), scale, less, WIDEST)
        for j in range(wide, middle):
            _write(out, to + j, lanes(stored, at + j, 1), scale, less, 1)
        wide = middle + (first + size - middle) // WIDEST * WIDEST
        for j in range(middle, wide, WIDEST):
            _write(out, to + j, high_lanes(stored, at + j - row, WIDEST), scale, less, WIDEST)
        for j in range(wide, first + size):
            _write(out, to + j, high_lanes(stored, at + j - row, 1), scale, less, 1)


@compiled()
def _unpack(part, stored, out, n):
    """Write the codes of n tokens as numbers; ``out`` has room for words that are not full."""
    width, row, bits = part[WIDTH], part[ROW], part[BITS]
    if bits == 8:
        _bytes(stored, out)
        return
    runs = 8 if bits == 3 else 8 // bits
    columns = row * 8 // bits // runs
    to = out[: n * runs * columns].reshape(n, runs, columns)
    if bits == 4:
        _halves(stored.reshape(n, row), to)
    else:
        _codes(stored.reshape(n, row // columns, columns), to, bits)
    if runs * columns > width:
        for t in range(1, n):
            for j in range(width):
                out[t * width + j] = out[t * runs * columns + j]


@compiled()
def _read_by_channel(part, stored, scale_at, zero_at, n, whole, factors):
    """Write numbers of a block of tokens with a scale for each dimension."""
    width, unit = part[WIDTH], np.float32(2.0 ** part[BITS] / 256)
    _unpack(part, stored, whole, n)
    widen_float16(numbers_at(scale_at, width, np.uint16), factors)
    zeros = numbers_at(zero_at, width, np.uint8)
    for t in range(n):
        _by_channel(whole[t * width : (t + 1) * width], factors, zeros, unit)


@compiled()
def _read_by_token(part, stored, scale_at, zero_at, n, whole, factors, lost):
    """Write numbers of tokens with a scale for each block of dimensions."""
    blocks, width, bits = part[BLOCKS], part[WIDTH], part[BITS]
    size, scales, less = width // blocks, factors[: n * blocks], lost[: n * blocks]
    _factors_of_blocks(part, scale_at, zero_at, scales, less)
    if part[FORM] == TOKEN_FORM and bits == 8:
        _scale_bytes(stored, whole, size, scales, less)
    elif part[FORM] == TOKEN_FORM and bits == 4 and 2 * part[ROW] == width:
        _scale_halves(stored.view(np.int8), whole, part[ROW], blocks, size, scales, less)
    else:
        _unpack(part, stored, whole, n)
        out = whole[: n * width]
        if part[FORM] == NORMAL_FORM:
            _bend(out, bits)
        _scale(out.reshape(n * blocks, size), scales, less)


@compiled()
def read_numbers(part, at, scale_at, zero_at, n, room, factors, lost):
    """Return the numbers [n * w] of n latents that begin at ``at``; they may lie in ``room``.

    They are read some tokens at a time, which stay near while they are unpacked, bent and scaled.
    """
    form, width, row = part[FORM], part[WIDTH], part[ROW]
    if form == FLOAT32:
        return numbers_at(at, n * width, np.float32)
    for start in range(0, n, TOKENS):
        m, whole = min(TOKENS, n - start), room[start * width :]
        stored = numbers_at(at + start * row, m * row, np.uint8)
        if form == BFLOAT16:
            widen_bfloat16(stored.view(np.uint16), whole)
        elif form == FLOAT16:
            widen_float16(stored.view(np.uint16), whole[: m * width])
        elif form == CHANNEL_FORM:
            first = start // TOKENS * width
            where = (scale_at + 2 * first, zero_at + first, m, whole, factors)
            _read_by_channel(part, stored, *where)
        else:
            first = start * part[BLOCKS]
            where = (scale_at + 2 * first, zero_at + first, m, whole, factors, lost)
            _read_by_token(part, stored, *where)
    return room[: n * width]


@compiled()
def dimension(j, runs, size):
    """Return which dimension is number j of a latent in the order of words."""
    return j % runs * (size // runs) + j // runs
