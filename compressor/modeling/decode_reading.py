"""What the decode kernels read: units of rows, the codes in them, and their scales.

A part is a tuple of its codes, scales and zero points, and the strides of sequences and latents of
codes and scales. What the constants mean is in :mod:`decode_tiles`. Letters: R rows of a block,
N columns, U units of a piece.
"""

from __future__ import annotations

try:
    import triton
    import triton.language as tl
except ImportError as missing:
    raise ImportError("the package triton is not installed") from missing

ONE_AND_UP = tl.constexpr(0x6400)  # bits of fp16 1024: a code added to them adds its value


@triton.constexpr_function
def scores_shape(section):
    """Return the shape [R, N] of scores."""
    return [section.rows, section.columns]


@triton.constexpr_function
def length(items):
    """Return a length, known when compiling."""
    return len(items)


@triton.constexpr_function
def static(value):
    """Return what is known when compiling."""
    return value


@triton.constexpr_function
def element(items, index):
    """Return an element, known when compiling."""
    return items[index]


@triton.constexpr_function
def piece_of(tile, term):
    """Return the piece that a product reads."""
    return tile.pieces[tile.terms[term][1]]


@triton.constexpr_function
def field_of(tile, term):
    """Return the field of its piece that a product reads."""
    return tile.fields[tile.terms[term][2]]


@triton.constexpr_function
def two_to(n):
    """Return two to the power of ``n``, which may be negative."""
    return 2.0**n


@triton.jit
def codes_of_units(
    PIECE: tl.constexpr, FIELD: tl.constexpr, TILE: tl.constexpr, TOKENS: tl.constexpr
):
    """Return of each unit of a piece which latent of the row it is of, its code, and if it is."""
    unit = PIECE.offset + tl.arange(0, PIECE.size)
    code = FIELD.first + TILE.step * (unit % TILE.units)
    inside = (unit < TILE.units * TOKENS) & (code < TILE.width)
    return unit // TILE.units, code, inside


@triton.jit
def base_of(part, batch, latent, TILE: tl.constexpr):
    """Return where a latent's codes begin."""
    base = part[0] + batch * part[3] + latent * part[4]
    if (not TILE.exact) and TILE.unit_bytes == 2:
        base = base.to(tl.pointer_type(tl.uint16))
    return base


@triton.jit
def read_units(
    base,
    first,
    left,
    PIECE: tl.constexpr,
    TILE: tl.constexpr,
    SECTION: tl.constexpr,
    BY_UNIT: tl.constexpr,
):
    """Return the units of a piece from token ``first`` on, of which ``left`` are wanted.

    Their shape is [R, U], or [U, R] with ``BY_UNIT``.
    """
    row = tl.expand_dims(tl.arange(0, SECTION.rows), 1 - BY_UNIT) * SECTION.tokens
    unit = PIECE.offset + tl.expand_dims(tl.arange(0, PIECE.size), static(BY_UNIT))
    wanted = unit < TILE.units * SECTION.tokens
    if TILE.whole or SECTION.tokens == 1:
        wanted = wanted & (row < left)
    elif TILE.exact:
        wanted = wanted & (row * TILE.units + unit < left * TILE.units)
    else:
        wanted = wanted & (row + unit // TILE.units < left)
    if TILE.unit_bytes == 3:
        place = base + (first + row + unit // TILE.units) * (3 * TILE.units) + unit % TILE.units
        low = tl.load(place, mask=wanted, other=0).to(tl.uint16)
        middle = tl.load(place + TILE.units, mask=wanted, other=0).to(tl.uint16)
        high = tl.load(place + 2 * TILE.units, mask=wanted, other=0).to(tl.uint16)
        found = (low | (middle << 8), middle | (high << 8))
    else:
        place = base + first * TILE.units + (row * TILE.units + unit)
        one = tl.load(place, mask=wanted, other=0)
        found = (one, one)
    return found


@triton.constexpr_function
def two_numbers(tile, field):
    """Return PTX, see :class:`decode_tiles.Tile`."""
    return tile.two_numbers(field)


@triton.jit
def numbers_of(units, FIELD: tl.constexpr, TILE: tl.constexpr, UPCAST: tl.constexpr):
    """Return what one field of units stands for: numbers, levels, or codes over CODE."""
    found = units[FIELD.source]
    if not TILE.exact:
        word = found.to(tl.uint16)
        if not UPCAST:
            found = tl.inline_asm_elementwise(
                two_numbers(TILE, FIELD), "=r,r", [word], dtype=tl.float16, is_pure=True, pack=2
            )
        else:  # the interpreter knows no assembly
            code = (word >> FIELD.shift) & (TILE.mask << FIELD.position)
            if TILE.normal:
                found = (code | ONE_AND_UP).to(tl.float16, bitcast=True) - 1024.0
                found = found * two_to(-FIELD.position) - TILE.mask / 2
                found = found * (found * found * TILE.cubic[1] + TILE.cubic[0])
            else:
                found = code.to(tl.float16, bitcast=True)
    if UPCAST:  # and multiplies what numpy knows
        found = found.to(tl.float32)
    return found


@triton.jit
def reads_latent(head, latent, TILE: tl.constexpr, SECTION: tl.constexpr):
    """Return whether a column's head reads a latent of this program."""
    return (head < SECTION.heads) & (head // (SECTION.heads // TILE.latents) == latent)


@triton.jit
def spread(x, SECTION: tl.constexpr):
    """Give tokens of rows [R, tokens] their columns [R, N], or one that is broadcast."""
    if SECTION.tokens > 1 and SECTION.tokens < SECTION.columns:
        heads: tl.constexpr = static(SECTION.columns // SECTION.tokens)
        x = tl.broadcast_to(x[:, None, :], [x.shape[0], heads, x.shape[1]])
        x = tl.reshape(x, scores_shape(SECTION))
    return x


@triton.constexpr_function
def scaled_terms(tile):
    """Return how many scales a block of tokens has: of blocks, or of products by channel."""
    if tile.exact:
        return 0
    return tile.latents * (len(tile.terms) if tile.by_channel else tile.blocks)


@triton.jit
def _in_word(pointer, wanted):
    """Return what is read where ``wanted``, in the low bits of the word of 4 bytes it is in."""
    address = pointer.to(tl.int64)
    word = (address & ~3).to(tl.pointer_type(tl.uint32))
    return tl.load(word, mask=wanted, other=0) >> ((address.to(tl.uint32) & 3) << 3)


@triton.jit
def read_scales(part, batch, group, first, left, TILE: tl.constexpr, SECTION: tl.constexpr):
    """Return scale and zero point of every block of a part as they are stored.

    They follow each other latent by latent, each of them [R, tokens], or [U] by channel.
    """
    scales = ()
    zeros = ()
    for n in tl.static_range(scaled_terms(TILE)):
        if TILE.by_channel:
            number = group * TILE.latents + n // length(TILE.terms)
            _, code, wanted = codes_of_units(
                piece_of(TILE, n % length(TILE.terms)),
                field_of(TILE, n % length(TILE.terms)),
                TILE,
                1,
            )
            place = first // TILE.token_block * TILE.width + code
            wanted = wanted & (tl.zeros_like(code) < left)
        else:
            number = group * TILE.latents + n // TILE.blocks
            row = tl.arange(0, SECTION.rows)[:, None] * SECTION.tokens
            inner = row + tl.arange(0, SECTION.tokens)[None, :]
            place = (first + inner) * TILE.blocks + n % TILE.blocks
            wanted = inner < left
            if TILE.whole:  # a row's are read side by side, whether or not all are wanted
                wanted = tl.broadcast_to(row < left, wanted.shape)
        place = batch * part[5] + number * part[6] + place
        if SECTION.scales_in_words:
            scale = _in_word(part[1] + place, wanted).to(tl.uint16).to(tl.float16, bitcast=True)
        else:
            scale = tl.load(part[1] + place, mask=wanted, other=1.0)
        zero = scale
        if TILE.has_zero:
            if SECTION.scales_in_words:
                zero = _in_word(part[2] + place, wanted).to(tl.uint8)
            else:
                zero = tl.load(part[2] + place, mask=wanted, other=0)
        scales = scales + (scale,)
        zeros = zeros + (zero,)
    return scales, zeros


@triton.jit
def token_scales(scale, zero, TILE: tl.constexpr, SECTION: tl.constexpr):
    """Return scale and zero point, as it is stored, of tokens as :func:`spread` gives them."""
    scale = spread(scale.to(tl.float32), SECTION)
    if TILE.has_zero:
        zero = spread(zero.to(tl.float32), SECTION)
    else:
        zero = scale
    return scale, zero


@triton.jit
def channel_scales(scale, zero, TILE: tl.constexpr):
    """Return scale and zero point, in codes, of the dimensions [U] of one field of a piece."""
    return scale.to(tl.float32), zero.to(tl.float32) * TILE.zero_unit
