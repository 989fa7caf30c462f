"""The kernel of :mod:`triton_quantize`: latents are rounded and packed in one pass.

It does what :mod:`quantizer_affine` and :mod:`quantizer_normal` do, operation by operation, so
that a cache holds the same bits whichever of them wrote it. Letters: R latents of a program, N
dimensions of each in the order of :mod:`packing`, run after run, filled up to a power of two.
"""

from __future__ import annotations

try:
    import triton
    import triton.language as tl
except ImportError as missing:
    raise ImportError("the package triton is not installed") from missing

from .decode_reading import element, length, static

CHANGING = ["latents", "groups", "tokens"]  # not to compile for each
TO_WHOLE = tl.constexpr(1.5 * 2.0**23)  # added and taken away rounds to the nearest whole number


@triton.jit
def _rounded(x, top: tl.constexpr):
    """Return what lies nearest to ``x`` of the whole numbers from 0 to ``top``, ties to even."""
    kept = tl.minimum(tl.maximum(x, 0.0), top)
    return (kept + TO_WHOLE) - TO_WHOLE


@triton.jit
def _broken(x, inside):
    """Return of each latent [R] whether one of its numbers is not a number."""
    return tl.max((inside & (x != x)).to(tl.int32), 1) > 0  # noqa: PLR0124


@triton.jit
def _stored(scale, broken, FORM: tl.constexpr):
    """Return scales [R] as fp16 numbers; NaN where what they are of is not a number."""
    kept = tl.minimum(tl.maximum(scale, FORM.smallest), FORM.largest)
    return tl.where(broken, float("nan"), kept.to(tl.float32)).to(tl.float16)


@triton.jit
def _affine(x, inside, FORM: tl.constexpr):
    """Return scale [R] as it is stored, and zero point, of dimensions that share them."""
    low = tl.minimum(tl.min(tl.where(inside, x, 0.0), 1), 0.0)
    high = tl.maximum(tl.max(tl.where(inside, x, 0.0), 1), 0.0)
    scale = _stored((high - low) * FORM.shrink, _broken(x, inside), FORM)
    middle = FORM.top - tl.div_rn(low + high, scale.to(tl.float32))
    return scale, _rounded(middle / 2 / FORM.zero_unit, FORM.zero_top)


@triton.jit
def _normal_codes(x, scale, FORM: tl.constexpr):
    """Return codes [R, N]: how many of the limits between levels lie below."""
    ratio = tl.div_rn(x, scale.to(tl.float32)[:, None])
    codes = tl.zeros_like(x)
    for limit in tl.static_range(static(FORM.top)):
        codes += (ratio > FORM.limits[limit]).to(tl.float32)
    return codes


@triton.jit
def _normal(x, inside, FORM: tl.constexpr):
    """Return scales [R] as they are stored."""
    exact = tl.where(inside, x, 0.0).to(tl.float64)
    broken = _broken(x, inside)
    scale = tl.sqrt(tl.sum(exact * exact, 1) / FORM.dims)
    for _ in tl.static_range(static(FORM.refinements)):
        codes = _normal_codes(x, _stored(scale, broken, FORM), FORM)
        levels = tl.zeros_like(x)
        for code in tl.static_range(length(FORM.levels)):
            levels = tl.where(codes == code, element(FORM.levels, code), levels)
        levels = tl.where(inside, levels, 0.0).to(tl.float64)
        scale = tl.sum(levels * exact, 1) / tl.sum(levels * levels, 1)
    return _stored(scale, broken, FORM)


@triton.jit(do_not_specialize=CHANGING, do_not_specialize_on_alignment=CHANGING)
def quantize(
    x,
    x_b,
    x_g,
    x_t,
    codes,
    codes_b,
    codes_g,
    scales,
    zeros,
    scales_b,
    scales_g,
    latents,
    groups,
    tokens,
    places,
    FORM: tl.constexpr,
    PLACED: tl.constexpr,
):
    """Pack some latents: programs are latents / R.

    Args:
        x: [b, g, t, w], any floating point dtype.
        x_b: stride of its sequences; likewise ``x_g`` and ``x_t``.
        codes: uint8 [b, g, t, bytes], a latent's tokens behind each other.
        codes_b: stride of their sequences; likewise ``codes_g``.
        scales: fp16 [b, g, t, blocks].
        zeros: uint8, strides as those of the scales; not written where the scheme has none.
        scales_b: stride of their sequences; likewise ``scales_g``.
        latents: b * g * t.
        groups: g.
        tokens: t.
        places: int64 [2], tokens to skip of what is read and of what is written, if ``PLACED``.
        FORM: what is written.
        PLACED: whether there are any.
    """
    row = tl.program_id(0) * FORM.rows + tl.arange(0, FORM.rows)
    alive = row < latents
    token = (row % tokens).to(tl.int64)
    group = (row // tokens % groups).to(tl.int64)
    batch = (row // tokens // groups).to(tl.int64)
    place = tl.arange(0, FORM.runs * FORM.room)
    run, column = place // FORM.room, place % FORM.room
    dim = run * FORM.columns + column
    known = alive[:, None] & ((column < FORM.columns) & (dim < FORM.width))[None, :]
    if PLACED:
        x += tl.load(places) * x_t
    start = x + batch * x_b + group * x_g + token * x_t
    given = tl.load(start[:, None] + dim[None, :], mask=known, other=0.0).to(tl.float32)
    if PLACED:
        token += tl.load(places + 1)
    scale_at = batch * scales_b + group * scales_g + token * FORM.blocks
    found = tl.zeros_like(given)
    for block in tl.static_range(static(FORM.blocks)):
        inside = known & (dim // FORM.dims == block)[None, :]
        if FORM.normal:
            scale = _normal(given, inside, FORM)
            rounded = _normal_codes(given, scale, FORM)
        else:
            scale, zero = _affine(given, inside, FORM)
            ratio = tl.div_rn(given, scale.to(tl.float32)[:, None])
            rounded = _rounded(ratio + (zero * FORM.zero_unit)[:, None], FORM.top)
            tl.store(zeros + scale_at + block, zero.to(tl.uint8), mask=alive)
        tl.store(scales + scale_at + block, scale, mask=alive)
        found = tl.where(inside, rounded, found)
    word = found.to(tl.int32) << (run * FORM.bits)[None, :]
    word = tl.sum(tl.reshape(word, [FORM.rows, FORM.runs, FORM.room]), 1)
    at = codes + batch * codes_b + group * codes_g + token * (FORM.bytes * FORM.columns)
    columns = tl.arange(0, FORM.room)
    wanted = alive[:, None] & (columns < FORM.columns)[None, :]
    for byte in tl.static_range(static(FORM.bytes)):
        target = at[:, None] + (byte * FORM.columns + columns)[None, :]
        tl.store(target, (word >> (8 * byte)).to(tl.uint8), mask=wanted)
