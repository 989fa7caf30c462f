"""What stored latents stand for: levels, float32, and the scales and zero points beside them.

Codes of 3 and 2 bits are read word by word where each token has one scale, and stay in the order
in which words hold them; all others have the order of the latent. Letters: n tokens, w width.
"""

from __future__ import annotations

from .numba_compiled import FAST, compiled
from .numba_lanes import keep, unpacked
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


@compiled()
def read_levels(part, at, scale_at, zero_at, n, room, factors):
    """Return the levels [n * w] of n latents that begin at ``at``; they may lie in ``room``."""
    form, width, row, bits = part[FORM], part[WIDTH], part[ROW], part[BITS]
    if form == FLOAT32:
        return numbers_at(at, n * width, np.float32)
    out, stored = room[: n * width], numbers_at(at, n * row, np.uint8)
    if form == BFLOAT16:
        widen_bfloat16(stored.view(np.uint16), out)
    elif form == FLOAT16:
        widen_float16(stored.view(np.uint16), out)
    elif bits == 8:
        _bytes(stored, out)
    else:
        runs = 8 if bits == 3 else 8 // bits
        columns = row * 8 // bits // runs
        to = room[: n * runs * columns].reshape(n, runs, columns)
        if bits == 4:
            _halves(stored.reshape(n, row), to)
        else:
            _codes(stored.reshape(n, row // columns, columns), to, bits)
        if runs * columns > width:
            for t in range(1, n):
                for j in range(width):
                    room[t * width + j] = room[t * runs * columns + j]
    if form == NORMAL_FORM:
        _bend(out, bits)
    elif form == CHANNEL_FORM:
        unit = np.float32(2.0**bits / 256)
        for block in range(n // TOKENS):
            widen_float16(numbers_at(scale_at + 2 * block * width, width, np.uint16), factors)
            zeros = numbers_at(zero_at + block * width, width, np.uint8)
            for t in range(block * TOKENS, (block + 1) * TOKENS):
                _by_channel(out[t * width : (t + 1) * width], factors, zeros, unit)
    return out


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


@compiled()
def dimension(j, runs, size):
    """Return which dimension is number j of a latent in the order of words."""
    return j % runs * (size // runs) + j // runs
