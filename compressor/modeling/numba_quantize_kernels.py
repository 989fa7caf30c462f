"""The kernel of :mod:`numba_quantize`: latents are rounded and packed one after the other.

It does what :mod:`quantizer_affine` and :mod:`quantizer_normal` do, operation by operation, so
that a cache holds the same bits whichever of them wrote it. All jitted functions are in this file
because numba's cache looks at one file only.
"""

from __future__ import annotations

from .numba_compiled import compiled

try:
    import numpy as np
except ImportError as missing:
    raise ImportError("the package numpy is not installed") from missing

from .quantizer import LARGEST, SMALLEST
from .quantizer_normal import REFINEMENTS

F = np.float32
LEAST, MOST = F(SMALLEST), F(LARGEST)
SUBNORMAL = F(2.0**-14)  # an fp16 number below this has fewer digits
HALF_UNIT = F(2.0**112)  # an fp16 number over the float32 with its bits shifted
NOT_A_NUMBER = np.uint16(0x7E00)


@compiled()
def _stored(scale, whole, bits):
    """Return the bits of a scale as an fp16 number, and that number; whole and bits are room."""
    kept = F(min(max(F(scale), LEAST), MOST))
    if kept < SUBNORMAL:
        whole[0] = kept + F(0.5)
        half = np.int64(bits[0]) - 0x3F000000
    else:
        whole[0] = kept
        word = np.int64(bits[0])
        half = ((word + 0x0FFF + ((word >> 13) & 1)) >> 13) - (112 << 10)
    bits[0] = np.uint32(half << 13)
    return np.uint16(half), F(whole[0] * HALF_UNIT)


@compiled()
def _whole(x, top):
    """Return what lies nearest to ``x`` of the whole numbers from 0 to ``top``, ties to even."""
    return F(min(max(np.rint(x), F(0.0)), top))


@compiled()
def _normal_code(ratio, limits):
    code = 0
    for limit in limits:
        code += ratio > limit
    return code


@compiled()
def _normal_scale(x, limits, levels, whole, bits):
    """Return the scale of numbers [D], in the least squares sense of the codes it gives them."""
    scale = 0.0
    for j in range(x.shape[0]):
        scale += np.float64(x[j]) * np.float64(x[j])
    scale = np.sqrt(scale / x.shape[0])
    for _ in range(REFINEMENTS):
        _, step = _stored(scale, whole, bits)
        dot = square = 0.0
        for j in range(x.shape[0]):
            level = np.float64(levels[_normal_code(x[j] / step, limits)])
            dot += level * np.float64(x[j])
            square += level * level
        scale = dot / square
    return scale


@compiled()
def _pack(codes, word_bits, runs, out):
    """Pack codes, whose number is a multiple of ``runs``, as :mod:`packing` lays them out."""
    columns = codes.shape[0] // runs
    for j in range(columns):
        word = 0
        for k in range(runs):
            word |= np.int64(codes[k * columns + j]) << (k * word_bits)
        for byte in range(out.shape[0] // columns):
            out[byte * columns + j] = np.uint8((word >> (8 * byte)) & 255)


@compiled(
    "void(float32[:, :, :, :], uint8[:, :, :, :], uint16[:, :, :, :], uint8[:, :, :, :], int64,"
    "int64, float32, float32, float32[::1], float32[::1], uint8[::1], float32[::1], uint32[::1])"
)
def quantize(
    x, packed, scales, zeros, bits, runs, shrink, unit, limits, levels, codes, whole, whole_bits
):
    """Pack latents.

    Args:
        x: [b, g, t, w].
        packed: uint8 [b, g, t, bytes], written.
        scales: bits of fp16 [b, g, t, blocks], written.
        zeros: likewise, bytes; not where there are levels.
        bits: of a code.
        runs: codes of a word.
        shrink: by what the range of numbers becomes a scale.
        unit: what a zero point's byte counts, in codes.
        limits: between the levels of normal numbers; empty for others.
        levels: of normal numbers.
        codes: room for those of a latent, a multiple of ``runs``.
        whole: room for one number.
        whole_bits: the same memory.
    """
    width, blocks = x.shape[3], scales.shape[3]
    dims, top = width // blocks, F(2**bits - 1)
    codes[:] = 0
    for b in range(x.shape[0]):
        for g in range(x.shape[1]):
            for t in range(x.shape[2]):
                for block in range(blocks):
                    own = x[b, g, t, block * dims : (block + 1) * dims]
                    low = high = F(0.0)
                    broken = False
                    for j in range(dims):
                        low, high = min(low, own[j]), max(high, own[j])
                        broken |= own[j] != own[j]
                    if levels.shape[0]:
                        scale = _normal_scale(own, limits, levels, whole, whole_bits)
                        half, step = _stored(scale, whole, whole_bits)
                        for j in range(dims):
                            codes[block * dims + j] = _normal_code(own[j] / step, limits)
                    else:
                        half, step = _stored((high - low) * shrink, whole, whole_bits)
                        middle = F(top - F(low + high) / step) / F(2.0) / unit
                        zero = _whole(middle, top / unit)
                        zeros[b, g, t, block] = np.uint8(zero)
                        for j in range(dims):
                            code = _whole(F(own[j] / step + zero * unit), top)
                            codes[block * dims + j] = np.uint8(code)
                    scales[b, g, t, block] = NOT_A_NUMBER if broken else half
                _pack(codes, bits, runs, packed[b, g, t])
