"""The kernels of :mod:`triton_decode`: one query attends over latents in few bits.

A program reads some tokens of one group of heads and leaves the weighted sum of their values beside
its norm and the power of two that both are relative to; a second kernel joins what the programs
left. All heads of a group are columns of one matrix, so that each latent is read once. Where they
are fewer than 8 a row holds several latents, and a column is one head on one of these (its queries
are zero on the others): nothing of a matrix unit stays empty, and a row's bytes are read side by
side whatever a latent's width.

Scales and zero points are taken out of the products: ``q . (scale * (code - zero))`` is ``scale *
(q . code - zero * sum(q))``. What the constants mean is in :mod:`decode_tiles`; a part is a tuple
of its codes, scales and zero points, and the strides of sequences and latents of codes and scales.
Letters: R rows of a block, N columns, U units of a piece.
"""

from __future__ import annotations

try:
    import triton
    import triton.language as tl
except ImportError as missing:
    raise ImportError("the package triton is not installed") from missing

LOWEST = tl.constexpr(-1e30)  # below any score; finite, so that differences are numbers
CODE = tl.constexpr(2.0**24)  # a code over its fp16 number that is not normalised
LIFT = tl.constexpr(2.0**15)  # of weights, which are at most 1, to use the range of fp16
ONE_AND_UP = tl.constexpr(0x6400)  # bits of fp16 1024: a code added to them adds its value


@triton.constexpr_function
def _shape(section):
    """Return the shape [R, N] of scores."""
    return [section.rows, section.columns]


@triton.constexpr_function
def _length(items):
    return len(items)


@triton.constexpr_function
def _static(value):
    return value


@triton.constexpr_function
def _of(items, index):
    """Return what is known when compiling: element ``index``."""
    return items[index]


@triton.constexpr_function
def _values(section):
    return section.values


@triton.constexpr_function
def _piece(tile, term):
    """Return the piece that a product reads."""
    return tile.pieces[tile.terms[term][1]]


@triton.constexpr_function
def _sums_shape(tile, term, section):
    """Return the shape [U, N] of the sums of a product."""
    return [tile.pieces[tile.terms[term][1]].size, section.columns]


@triton.constexpr_function
def _field(tile, term):
    """Return the field of its piece that a product reads."""
    return tile.fields[tile.terms[term][2]]


@triton.constexpr_function
def _power(n):
    """Return two to the power of ``n``, which may be negative."""
    return 2.0**n


@triton.jit
def _units(PIECE: tl.constexpr, FIELD: tl.constexpr, TILE: tl.constexpr, TOKENS: tl.constexpr):
    """Return of each unit of a piece which latent of the row it is of, its code, and if it is."""
    unit = PIECE.offset + tl.arange(0, PIECE.size)
    code = FIELD.first + TILE.step * (unit % TILE.units)
    inside = (unit < TILE.units * TOKENS) & (code < TILE.width)
    return unit // TILE.units, code, inside


@triton.jit
def _base(part, batch, latent, TILE: tl.constexpr):
    """Return where a latent's codes begin."""
    base = part[0] + batch * part[3] + latent * part[4]
    if (not TILE.exact) and TILE.unit_bytes == 2:
        base = base.to(tl.pointer_type(tl.uint16))
    return base


@triton.jit
def _read(
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
    unit = PIECE.offset + tl.expand_dims(tl.arange(0, PIECE.size), _static(BY_UNIT))
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
def _two_numbers(tile, field):
    return tile.two_numbers(field)


@triton.jit
def _numbers(units, FIELD: tl.constexpr, TILE: tl.constexpr, UPCAST: tl.constexpr):
    """Return what one field of units stands for: numbers, levels, or codes over CODE."""
    found = units[FIELD.source]
    if not TILE.exact:
        word = found.to(tl.uint16)
        if not UPCAST:
            found = tl.inline_asm_elementwise(
                _two_numbers(TILE, FIELD), "=r,r", [word], dtype=tl.float16, is_pure=True, pack=2
            )
        else:  # the interpreter knows no assembly
            code = (word >> FIELD.shift) & (TILE.mask << FIELD.position)
            if TILE.normal:
                found = (code | ONE_AND_UP).to(tl.float16, bitcast=True) - 1024.0
                found = found * _power(-FIELD.position) - TILE.mask / 2
                found = found * (found * found * TILE.cubic[1] + TILE.cubic[0])
            else:
                found = code.to(tl.float16, bitcast=True)
    if UPCAST:  # and multiplies what numpy knows
        found = found.to(tl.float32)
    return found


@triton.jit
def _own_head(head, latent, TILE: tl.constexpr, SECTION: tl.constexpr):
    """Return whether a column's head reads a latent of this program."""
    return (head < SECTION.heads) & (head // (SECTION.heads // TILE.latents) == latent)


@triton.jit
def _query_tile(
    query,
    shrink,
    head,
    place,
    latent: tl.constexpr,
    TERM: tl.constexpr,
    TILE: tl.constexpr,
    SECTION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Return what one field of a piece is multiplied with, [U, N]."""
    at, code, inside = _units(_piece(TILE, TERM), _field(TILE, TERM), TILE, SECTION.tokens)
    inside = inside & (code // TILE.block == TILE.terms[TERM][0])
    kept = inside[:, None] & _own_head(head, latent, TILE, SECTION)[None, :]
    kept = kept & (at[:, None] == place[None, :])
    where = query + head[None, :] * SECTION.query_stride + TILE.first + code[:, None]
    found = tl.load(where, mask=kept, other=0.0)
    if not TILE.exact:
        found = found.to(tl.float32) * shrink
        if not TILE.normal:
            found = found * _power(-_field(TILE, TERM).position)
        if not TILE.by_channel:
            found = found.to(tl.float16)
    if UPCAST:
        found = found.to(tl.float32)
    return found


@triton.jit
def _queries(
    query,
    shrink,
    head,
    place,
    TILE: tl.constexpr,
    SECTION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Return the tiles of all products with a part, and the sums [N] for each of its scales."""
    tiles = ()
    sums = ()
    for latent in tl.static_range(_static(TILE.latents)):
        for t in tl.static_range(_length(TILE.terms)):
            tiles = tiles + (
                _query_tile(query, shrink, head, place, latent, t, TILE, SECTION, UPCAST),
            )
        for block in tl.static_range(_static(TILE.blocks)):
            total = tl.zeros([_static(SECTION.columns)], tl.float32)
            if TILE.has_zero and not TILE.by_channel:
                for t in tl.static_range(_length(TILE.terms)):
                    if TILE.terms[t][0] == block:
                        tile = tiles[latent * _length(TILE.terms) + t].to(tl.float32)
                        total += tl.sum(tile, 0) * _power(_field(TILE, t).position)
            sums = sums + (total,)
    return tiles, sums


@triton.jit
def _spread(x, SECTION: tl.constexpr):
    """Give tokens of rows [R, tokens] their columns [R, N], or one that is broadcast."""
    if SECTION.tokens > 1 and SECTION.tokens < SECTION.columns:
        heads: tl.constexpr = _static(SECTION.columns // SECTION.tokens)
        x = tl.broadcast_to(x[:, None, :], [x.shape[0], heads, x.shape[1]])
        x = tl.reshape(x, _shape(SECTION))
    return x


@triton.jit
def _scales(part, batch, latent, first, left, block, TILE: tl.constexpr, SECTION: tl.constexpr):
    """Return scale and zero point, in codes, of tokens as :func:`_spread` gives them."""
    inner = tl.arange(0, SECTION.rows)[:, None] * SECTION.tokens
    inner = inner + tl.arange(0, SECTION.tokens)[None, :]
    place = batch * part[5] + latent * part[6] + (first + inner) * TILE.blocks + block
    scale = tl.load(part[1] + place, mask=inner < left, other=1.0).to(tl.float32)
    scale = _spread(scale, SECTION)
    zero = scale
    if TILE.has_zero:
        zero = tl.load(part[2] + place, mask=inner < left, other=0).to(tl.float32)
        zero = _spread(zero * TILE.zero_unit, SECTION)
    return scale, zero


@triton.jit
def _channel_scales(part, batch, latent, first, TERM: tl.constexpr, TILE: tl.constexpr):
    """Return scale and zero point, in codes, of the dimensions [U] of one field of a piece."""
    _, code, inside = _units(_piece(TILE, TERM), _field(TILE, TERM), TILE, 1)
    place = batch * part[5] + latent * part[6] + first // TILE.token_block * TILE.width + code
    scale = tl.load(part[1] + place, mask=inside, other=0.0).to(tl.float32)
    zero = tl.load(part[2] + place, mask=inside, other=0).to(tl.float32) * TILE.zero_unit
    return scale, zero


@triton.jit
def _part_scores(
    part,
    tiles,
    sums,
    batch,
    group,
    first,
    left,
    grow,
    TILE: tl.constexpr,
    SECTION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Return the products of a part's tokens with the queries, [R, N]."""
    total = tl.zeros(_shape(SECTION), tl.float32)
    for latent in tl.static_range(_static(TILE.latents)):
        number = group * TILE.latents + latent
        base = _base(part, batch, number, TILE)
        units = ()
        for p in tl.static_range(_length(TILE.pieces)):
            units = units + (_read(base, first, left, _of(TILE.pieces, p), TILE, SECTION, 0),)
        for block in tl.static_range(_static(TILE.blocks)):
            found = tl.zeros(_shape(SECTION), tl.float32)
            for t in tl.static_range(_length(TILE.terms)):
                if TILE.terms[t][0] == block:
                    tile = tiles[latent * _length(TILE.terms) + t]
                    field = _numbers(units[TILE.terms[t][1]], _field(TILE, t), TILE, UPCAST)
                    if TILE.by_channel:
                        scale, zero = _channel_scales(part, batch, number, first, t, TILE)
                        top = tl.maximum(tl.max(scale, 0), 1e-30)
                        scaled = (tile * (scale / top)[:, None]).to(tl.float16)
                        level = tl.broadcast_to(zero[None, :].to(tl.float16), field.shape)
                        if UPCAST:
                            scaled = scaled.to(tl.float32)
                            level = level.to(tl.float32)
                        power = _power(_field(TILE, t).position)
                        found += tl.dot(field, scaled) * (top * CODE)
                        found -= tl.dot(level, scaled) * (top * power)
                    else:
                        found = tl.dot(field, tile, found)
            if TILE.exact:
                total += found
            elif TILE.by_channel:
                total += found * grow
            else:
                scale, zero = _scales(part, batch, number, first, left, block, TILE, SECTION)
                if TILE.has_zero:
                    found = found * CODE - zero * sums[latent * TILE.blocks + block][None, :]
                total += found * (scale * grow)
    return total


@triton.jit
def _value_scales(part, batch, group, first, left, TILE: tl.constexpr, SECTION: tl.constexpr):
    """Return scales and zero points of every block of the values, and the largest scale."""
    scales = ()
    zeros = ()
    top = 1.0
    if not (TILE.exact or TILE.by_channel):
        for latent in tl.static_range(_static(TILE.latents)):
            for block in tl.static_range(_static(TILE.blocks)):
                number = group * TILE.latents + latent
                scale, zero = _scales(part, batch, number, first, left, block, TILE, SECTION)
                scales = scales + (scale,)
                zeros = zeros + (zero,)
                if latent + block == 0:
                    top = scale
                else:
                    top = tl.maximum(top, scale)
    return scales, zeros, top


@triton.jit
def _add_values(
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
    lifted = weights * LIFT
    for latent in tl.static_range(_static(TILE.latents)):
        number = group * TILE.latents + latent
        base = _base(part, batch, number, TILE)
        units = ()
        for p in tl.static_range(_length(TILE.pieces)):
            units = units + (_read(base, first, left, _of(TILE.pieces, p), TILE, SECTION, 1),)
        scaled = ()
        for block in tl.static_range(_static(TILE.blocks)):
            own = lifted
            if not (TILE.exact or TILE.by_channel):
                own = lifted * scales[latent * TILE.blocks + block]
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
        for t in tl.static_range(_length(TILE.terms)):
            field = _numbers(units[TILE.terms[t][1]], _field(TILE, t), TILE, UPCAST)
            own = scaled[TILE.terms[t][0]]
            before = sums[latent * _length(TILE.terms) + t] * kept[None, :]
            if TILE.by_channel:
                scale, zero = _channel_scales(part, batch, number, first, t, TILE)
                added = tl.dot(field, own)
                added = added * (CODE * _power(-_field(TILE, t).position))
                norm = tl.sum(own.to(tl.float32), 0)
                added = before + scale[:, None] * (added - zero[:, None] * norm[None, :])
            else:
                added = tl.dot(field, own, before)
            new_sums = new_sums + (added,)
    return new_sums, new_lost


@triton.jit
def _store(
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
    for latent in tl.static_range(_static(TILE.latents)):
        for t in tl.static_range(_length(TILE.terms)):
            found = sums[latent * _length(TILE.terms) + t]
            if TILE.has_zero and not TILE.by_channel:
                zero = tl.sum(lost[latent * TILE.blocks + TILE.terms[t][0]], 0)
                code = CODE * _power(-_field(TILE, t).position)
                found = found * code - zero[None, :]
            elif not (TILE.exact or TILE.normal or TILE.by_channel):
                found = found * (CODE * _power(-_field(TILE, t).position))
            at, code, inside = _units(_piece(TILE, t), _field(TILE, t), TILE, SECTION.tokens)
            inside = inside & (code // TILE.block == TILE.terms[t][0])
            kept = inside[:, None] & _own_head(head, latent, TILE, SECTION)[None, :]
            kept = kept & (at[:, None] == place[None, :])
            row = (head * slots + slot + place) * TILE.width
            tl.store(out + row[None, :] + code[:, None], found * (1.0 / LIFT), mask=kept)


@triton.jit
def _masked(scores, mask, mask_h, head, token, alive, MASK: tl.constexpr):
    """Return scores of tokens that a column attends to, the others' at minus infinity."""
    if MASK != 0:
        place = mask + head[None, :] * mask_h + token
        if MASK == 1:
            alive = alive & (tl.load(place, mask=alive, other=0) != 0)
        else:
            added = tl.load(place, mask=alive, other=0.0).to(tl.float32)
            scores += added * 1.4426950408889634
    return tl.where(alive, scores, -float("inf"))


@triton.jit
def _attend_section(
    query,
    out,
    most_out,
    norm_out,
    mask,
    mask_h,
    factor,
    parts,
    counts,
    batch,
    group,
    split,
    slots,
    SECTION: tl.constexpr,
    MASK: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Attend over the tokens of one split of a section."""
    BLOCK: tl.constexpr = SECTION.rows * SECTION.tokens
    column = tl.arange(0, SECTION.columns)
    head, place = column // SECTION.tokens, column % SECTION.tokens
    start = split * counts[4] * BLOCK
    stop = tl.minimum(start + counts[4] * BLOCK, counts[0])
    shrink = 1.0
    grow = factor
    if SECTION.shrinks:
        dims = tl.arange(0, SECTION.query_room)
        inside = (column < SECTION.heads)[:, None] & (dims < SECTION.query_width)[None, :]
        where = query + column[:, None] * SECTION.query_stride + dims[None, :]
        whole = tl.load(where, mask=inside, other=0.0).to(tl.float32)
        power = tl.ceil(tl.log2(tl.maximum(tl.max(tl.abs(whole)), 1e-30)))
        shrink = tl.exp2(-power)
        grow = factor * tl.exp2(power)
    tiles = ()
    totals = ()
    for k in tl.static_range(_length(SECTION.keys)):
        own = _queries(query, shrink, head, place, _of(SECTION.keys, k), SECTION, UPCAST)
        tiles = tiles + (own[0],)
        totals = totals + (own[1],)
    VALUES: tl.constexpr = _values(SECTION)
    sums = ()
    lost = ()
    for latent in tl.static_range(_static(VALUES.latents)):
        for t in tl.static_range(_length(VALUES.terms)):
            sums = sums + (tl.zeros(_sums_shape(VALUES, t, SECTION), tl.float32),)
        for block in tl.static_range(_static(VALUES.blocks)):
            if VALUES.has_zero and not VALUES.by_channel:
                lost = lost + (tl.zeros(_shape(SECTION), tl.float32),)
    most = tl.full([_static(SECTION.columns)], LOWEST, tl.float32)
    norm = tl.zeros(_shape(SECTION), tl.float32)
    for first in tl.range(start, stop, BLOCK):
        left = stop - first
        inner = tl.arange(0, SECTION.rows)[:, None] * SECTION.tokens + place[None, :]
        alive = inner < left
        scores = tl.zeros(_shape(SECTION), tl.float32)
        for k in tl.static_range(_length(SECTION.keys)):
            at = first
            if SECTION.keys[k].moved:
                at = first + counts[5 + k]
            found = _part_scores(
                parts[k],
                tiles[k],
                totals[k],
                batch,
                group,
                at,
                left,
                grow,
                _of(SECTION.keys, k),
                SECTION,
                UPCAST,
            )
            if SECTION.keys[k].exact:
                found = found * factor
            scores += found
        scores = _masked(scores, mask, mask_h, head, counts[1] + first + inner, alive, MASK)
        at = first
        if VALUES.moved:
            at = first + counts[5 + _length(SECTION.keys)]
        values = parts[_length(SECTION.keys)]
        scales, zeros, top = _value_scales(values, batch, group, at, left, VALUES, SECTION)
        ranked = scores
        if not (VALUES.exact or VALUES.by_channel):
            ranked = scores + ((top.to(tl.int32, bitcast=True) >> 23) - 126).to(tl.float32)
        new = tl.maximum(most, tl.max(ranked, 0))
        kept = tl.exp2(most - new)
        most = new
        weights = tl.exp2(scores - most[None, :])
        norm = norm * kept[None, :] + weights
        sums, lost = _add_values(
            values,
            sums,
            lost,
            weights,
            scales,
            zeros,
            kept,
            batch,
            group,
            at,
            left,
            VALUES,
            SECTION,
            UPCAST,
        )
    slot = counts[3] + split * SECTION.tokens
    _store(out, sums, lost, head, place, slots, slot, VALUES, SECTION)
    row = head * slots + slot + place
    tl.store(most_out + row, most, mask=head < SECTION.heads)
    tl.store(norm_out + row, tl.sum(norm, 0), mask=head < SECTION.heads)


@triton.jit(do_not_specialize=["counts", "slots", "factor", "mask_b"])
def attend(
    query,
    query_b,
    out,
    most,
    norm,
    mask,
    mask_b,
    mask_h,
    factor,
    parts,
    counts,
    slots,
    heads,
    SECTIONS: tl.constexpr,
    MASK: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Attend over one split of the tokens: programs are splits x groups x sequences.

    Args:
        query: [b, h, k]; heads and dimensions have the strides of ``SECTIONS``.
        query_b: stride of its sequences.
        out: float32 [b, h, slots, v], the weighted sums.
        most: float32 [b, h, slots], the power of two that they are relative to.
        norm: float32 [b, h, slots], the sums of weights.
        mask: of tokens, for ``MASK`` 1 (bytes, not 0 attends) and 2 (added to scores).
        mask_b: stride of its sequences.
        mask_h: stride of its heads.
        factor: of the scores, times the logarithm of e to the base of 2.
        parts: for each section its key parts and its values.
        counts: for each section its tokens, the number of its first one in the mask, its first
            program, its first slot, the blocks of a program, and the first token of each part.
        slots: of a head.
        heads: of a sequence.
        SECTIONS: how each section is read.
        MASK: 0 for none.
        UPCAST: multiply in float32.
    """
    program = tl.program_id(0)
    group = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    for s in tl.static_range(_length(SECTIONS)):
        first_head = group * SECTIONS[s].heads
        row = (batch * heads + first_head) * slots
        split = program - counts[s][2]
        if (split >= 0) & (
            split * counts[s][4] * SECTIONS[s].rows * SECTIONS[s].tokens < counts[s][0]
        ):
            _attend_section(
                query + batch * query_b + first_head * SECTIONS[s].query_stride,
                out + row * SECTIONS[s].values.width,
                most + row,
                norm + row,
                mask + batch * mask_b + first_head * mask_h,
                mask_h,
                factor,
                parts[s],
                counts[s],
                batch,
                group,
                split,
                slots,
                _of(SECTIONS, s),
                MASK,
                UPCAST,
            )


@triton.jit(do_not_specialize=["slots"])
def join(
    out, most, norm, output, slots, WIDTH: tl.constexpr, ROOM: tl.constexpr, STEP: tl.constexpr
):
    """Join what the programs left: ``output`` [b, h, v], one program for each head."""
    row = tl.program_id(0).to(tl.int64)
    dims = tl.arange(0, ROOM)
    top = -1e30
    total = 0.0
    found = tl.zeros([ROOM], tl.float32)
    for first in tl.range(0, slots, STEP):
        slot = first + tl.arange(0, STEP)
        inside = slot < slots
        own = tl.load(most + row * slots + slot, mask=inside, other=-1e30)
        norms = tl.load(norm + row * slots + slot, mask=inside, other=0.0)
        where = (row * slots + slot)[:, None] * WIDTH + dims[None, :]
        sums = tl.load(out + where, mask=inside[:, None] & (dims < WIDTH)[None, :], other=0.0)
        new = tl.maximum(top, tl.max(own, 0))
        kept = tl.exp2(top - new)
        weights = tl.exp2(own - new)
        total = total * kept + tl.sum(weights * norms, 0)
        found = found * kept + tl.sum(sums * weights[:, None], 0)
        top = new
    found = tl.where(total > 0.0, found / total, 0.0)
    tl.store(output + row * WIDTH + dims, found, mask=dims < WIDTH)
