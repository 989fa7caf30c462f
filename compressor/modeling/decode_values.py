"""The sums of values of the decode kernels.

Letters: R rows of a block, N columns, U units of a piece.
"""

from __future__ import annotations

try:
    import triton
    import triton.language as tl
except ImportError as missing:
    raise ImportError("the package triton is not installed") from missing

from .decode_reading import (
    base_of,
    channel_scales,
    codes_of_units,
    element,
    field_of,
    length,
    numbers_of,
    piece_of,
    read_units,
    reads_latent,
    static,
    token_scales,
    two_to,
)

CODE = tl.constexpr(2.0**24)  # a code over its fp16 number that is not normalised
LIFT = tl.constexpr(15.0)  # powers of two of weights, to use the range of fp16


@triton.constexpr_function
def values_of(section):
    """Return the tile of the values."""
    return section.values


@triton.constexpr_function
def sums_shape(tile, term, section):
    """Return the shape [U, N] of the sums of a product."""
    return [tile.pieces[tile.terms[term][1]].size, section.columns]


@triton.jit
def value_scales(scales, zeros, alive, TILE: tl.constexpr, SECTION: tl.constexpr):
    """Return scales and zero points of every block of the values, and the largest scale.

    What was read of tokens that are not ``alive`` [R, N] may be no number; it becomes 0.
    """
    if TILE.exact or TILE.by_channel:
        top = 1.0
        wide = scales
        levels = zeros
    else:
        wide = ()
        levels = ()
        for n in tl.static_range(length(scales)):
            scale, zero = token_scales(scales[n], zeros[n], TILE, SECTION)
            if TILE.whole:
                scale = tl.where(alive, scale, 0.0)
            if TILE.has_zero:  # Triton reads ahead only what a product depends on
                scale = scale + zero * 0.0
            wide = wide + (scale,)
            levels = levels + (zero,)
            if n == 0:
                top = scale
            else:
                top = tl.maximum(top, scale)
    return wide, levels, top


@triton.jit
def add_values(
    part,
    sums,
    lost,
    weights,
    scales,
    zeros,
    kept,
    batch,
    group,
    first,
    left,
    TILE: tl.constexpr,
    SECTION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Return the sums [U, N] of all products, and of zero points, with a block's weights added."""
    new_sums = ()
    new_lost = ()
    for latent in tl.static_range(static(TILE.latents)):
        number = group * TILE.latents + latent
        base = base_of(part, batch, number, TILE)
        units = ()
        for p in tl.static_range(length(TILE.pieces)):
            units = units + (
                read_units(base, first, left, element(TILE.pieces, p), TILE, SECTION, 1),
            )
        scaled = ()
        for block in tl.static_range(static(TILE.blocks)):
            own = weights
            if not (TILE.exact or TILE.by_channel):
                own = weights * scales[latent * TILE.blocks + block]
            if TILE.exact:
                own = own.to(part[0].dtype.element_ty)
            else:
                own = own.to(tl.float16)
            if UPCAST:
                own = own.to(tl.float32)
            scaled = scaled + (own,)
            if TILE.has_zero and not TILE.by_channel:
                taken = own.to(tl.float32) * zeros[latent * TILE.blocks + block]
                new_lost = new_lost + (lost[latent * TILE.blocks + block] * kept[None, :] + taken,)
        for t in tl.static_range(length(TILE.terms)):
            field = numbers_of(units[TILE.terms[t][1]], field_of(TILE, t), TILE, UPCAST)
            own = scaled[TILE.terms[t][0]]
            before = sums[latent * length(TILE.terms) + t] * kept[None, :]
            if TILE.by_channel:
                scale, zero = channel_scales(
                    scales[latent * length(TILE.terms) + t],
                    zeros[latent * length(TILE.terms) + t],
                    TILE,
                )
                added = tl.dot(field, own)
                added = added * (CODE * two_to(-field_of(TILE, t).position))
                norm = tl.sum(own.to(tl.float32), 0)
                added = before + scale[:, None] * (added - zero[:, None] * norm[None, :])
            else:
                added = tl.dot(field, own, before)
            new_sums = new_sums + (added,)
    return new_sums, new_lost


@triton.jit
def store_sums(
    out,
    sums,
    lost,
    head,
    place,
    slots,
    slot,
    TILE: tl.constexpr,
    SECTION: tl.constexpr,
):
    """Write each head's sums of values to its slots."""
    for latent in tl.static_range(static(TILE.latents)):
        for t in tl.static_range(length(TILE.terms)):
            found = sums[latent * length(TILE.terms) + t]
            if TILE.has_zero and not TILE.by_channel:
                zero = tl.sum(lost[latent * TILE.blocks + TILE.terms[t][0]], 0) * TILE.zero_unit
                code = CODE * two_to(-field_of(TILE, t).position)
                found = tl.fma(found, code, -zero[None, :])
            elif not (TILE.exact or TILE.normal or TILE.by_channel):
                found = found * (CODE * two_to(-field_of(TILE, t).position))
            at, code, inside = codes_of_units(
                piece_of(TILE, t), field_of(TILE, t), TILE, SECTION.tokens
            )
            inside = inside & (code // TILE.block == TILE.terms[t][0])
            kept = inside[:, None] & reads_latent(head, latent, TILE, SECTION)[None, :]
            kept = kept & (at[:, None] == place[None, :])
            row = (head * slots + slot + place) * TILE.width
            tl.store(out + row[None, :] + code[:, None], found, mask=kept)
