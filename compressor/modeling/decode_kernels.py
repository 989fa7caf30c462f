"""The kernels of :mod:`triton_decode`: one query attends over latents in few bits.

A program reads some tokens of one group of heads and leaves the weighted sum of their values beside
its norm and the power of two that both are relative to; a second kernel joins what the programs
left. All heads of a group are columns of one matrix, so that each latent is read once. Where they
are fewer than 8 a row holds several latents, and a column is one head on one of these (its queries
are zero on the others): nothing of a matrix unit stays empty, and a row's bytes are read side by
side whatever a latent's width.

Scales and zero points are taken out of the products: ``q . (scale * (code - zero))`` is ``scale *
(q . code - zero * sum(q))``. Codes enter a product as fp16 numbers that are not normalised.
Letters: R rows of a block, N columns.
"""

from __future__ import annotations

try:
    import triton
    import triton.language as tl
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError as missing:
    raise ImportError("the package triton is not installed, or too old") from missing

from .decode_reading import element, length, read_scales, scores_shape, static
from .decode_scores import masked_scores, part_scores, query_range, query_tiles
from .decode_values import LIFT, add_values, store_sums, sums_shape, value_scales, values_of

CHANGING = ["slots", "factor", "mask_b"]  # from step to step: not to compile for each
BEFORE_PARTS = 5  # numbers of a section that are counted before the first tokens of its parts
COUNTS = tl.constexpr(BEFORE_PARTS)
LOWEST = tl.constexpr(-1e30)  # below any score; finite, so that differences are numbers


@triton.constexpr_function
def part_tile(section, index):
    """Return how a part is read: one of the keys', or after them the values."""
    return (*section.keys, section.values)[index]


@triton.jit
def count(counts, index: tl.constexpr):
    """Return a number that :func:`triton_decode.as_odd` wrote."""
    return (counts[index] - 3) >> 1


@triton.constexpr_function
def counted_parts(section):
    """Return how many numbers :func:`count` reads of a section."""
    return BEFORE_PARTS + len(section.keys) + 1


@triton.jit
def _counts_in_memory(counts, SECTIONS: tl.constexpr):
    """Return the counts of every section, read from the device."""
    found = ()
    at = counts + 1
    for s in tl.static_range(length(SECTIONS)):
        own = ()
        for k in tl.static_range(counted_parts(element(SECTIONS, s))):
            own = own + (tl.load(at + k).to(tl.int32),)
        at += counted_parts(element(SECTIONS, s))
        found = found + (own,)
    return found


@triton.jit
def _moved(counts, k: tl.constexpr, SECTION: tl.constexpr):
    """Return the number of a part's first token that is wanted."""
    first = 0
    if part_tile(SECTION, k).moved:
        first = count(counts, COUNTS + k)
    return first


@triton.jit
def _scales(parts, counts, batch, group, first, left, SECTION: tl.constexpr):
    """Return the scales and zero points of a block of every part."""
    found = ()
    for k in tl.static_range(length(SECTION.keys) + 1):
        at = first + _moved(counts, k, SECTION)
        found = found + (
            read_scales(parts[k], batch, group, at, left, part_tile(SECTION, k), SECTION),
        )
    return found


@triton.jit
def _attend_section(  # noqa: PLR0912
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
    EARLY: tl.constexpr,
):
    """Attend over the tokens of one split of a section."""
    BLOCK: tl.constexpr = SECTION.rows * SECTION.tokens
    column = tl.arange(0, SECTION.columns)
    head, place = column // SECTION.tokens, column % SECTION.tokens
    start = split * count(counts, 4) * BLOCK
    stop = tl.minimum(start + count(counts, 4) * BLOCK, count(counts, 0))
    if EARLY:
        gdc_wait()
    shrink = 1.0
    grow = factor
    if SECTION.shrinks:
        shrink = query_range(query, column, SECTION)
        grow = factor / shrink
    tiles = ()
    totals = ()
    for k in tl.static_range(length(SECTION.keys)):
        own = query_tiles(query, shrink, head, place, element(SECTION.keys, k), SECTION, UPCAST)
        tiles = tiles + (own[0],)
        totals = totals + (own[1],)
    VALUES: tl.constexpr = values_of(SECTION)
    sums = ()
    lost = ()
    for latent in tl.static_range(static(VALUES.latents)):
        for t in tl.static_range(length(VALUES.terms)):
            sums = sums + (tl.zeros(sums_shape(VALUES, t, SECTION), tl.float32),)
        for block in tl.static_range(static(VALUES.blocks)):
            if VALUES.has_zero and not VALUES.by_channel:
                lost = lost + (tl.zeros(scores_shape(SECTION), tl.float32),)
    most = tl.full([static(SECTION.columns)], LOWEST, tl.float32)
    norm = tl.zeros(scores_shape(SECTION), tl.float32)
    ahead = ()
    if SECTION.scales_ahead:
        ahead = _scales(parts, counts, batch, group, start, stop - start, SECTION)
    for first in tl.range(start, stop, BLOCK):
        left = stop - first
        if SECTION.scales_ahead:
            now = ahead
            ahead = _scales(parts, counts, batch, group, first + BLOCK, left - BLOCK, SECTION)
        else:
            now = _scales(parts, counts, batch, group, first, left, SECTION)
        inner = tl.arange(0, SECTION.rows)[:, None] * SECTION.tokens + place[None, :]
        alive = inner < left
        scores = tl.zeros(scores_shape(SECTION), tl.float32)
        for k in tl.static_range(length(SECTION.keys)):
            found = part_scores(
                parts[k],
                tiles[k],
                totals[k],
                now[k][0],
                now[k][1],
                batch,
                group,
                first + _moved(counts, k, SECTION),
                left,
                grow,
                element(SECTION.keys, k),
                SECTION,
                UPCAST,
            )
            if SECTION.keys[k].exact:
                found = found * factor
            scores += found
        scores = masked_scores(
            scores, mask, mask_h, head, count(counts, 1) + first + inner, alive, MASK
        )
        values = parts[length(SECTION.keys)]
        stored = now[length(SECTION.keys)]
        scales, zeros, top = value_scales(stored[0], stored[1], alive, VALUES, SECTION)
        ranked = scores
        if not (VALUES.exact or VALUES.by_channel):
            ranked = scores + ((top.to(tl.int32, bitcast=True) >> 23) - 126).to(tl.float32)
        new = tl.maximum(most, tl.max(ranked, 0))
        kept = tl.exp2(most - new)
        most = new
        weights = tl.exp2(scores - (most - LIFT)[None, :])
        norm = norm * kept[None, :] + weights
        sums, lost = add_values(
            values,
            sums,
            lost,
            weights,
            scales,
            zeros,
            kept,
            batch,
            group,
            first + _moved(counts, length(SECTION.keys), SECTION),
            left,
            VALUES,
            SECTION,
            UPCAST,
        )
    slot = count(counts, 3) + split * SECTION.tokens
    store_sums(out, sums, lost, head, place, slots, slot, VALUES, SECTION)
    row = head * slots + slot + place
    tl.store(most_out + row, most, mask=head < SECTION.heads)
    tl.store(norm_out + row, tl.sum(norm, 0), mask=head < SECTION.heads)


@triton.jit(do_not_specialize=CHANGING, do_not_specialize_on_alignment=CHANGING)
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
    COUNTED: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Attend over one split of the tokens: programs are splits x groups x sequences.

    Args:
        query: [b, h, k]; heads and dimensions have the strides of ``SECTIONS``.
        query_b: stride of its sequences.
        out: float32 [b, h, slots, v], the weighted sums, times two to the power of ``LIFT``.
        most: float32 [b, h, slots], the power of two that they are relative to.
        norm: float32 [b, h, slots], the sums of weights, lifted likewise.
        mask: of tokens, for ``MASK`` 1 (bytes, not 0 attends) and 2 (added to scores).
        mask_b: stride of its sequences.
        mask_h: stride of its heads.
        factor: of the scores, times the logarithm of e to the base of 2.
        parts: for each section its key parts and its values.
        counts: for each section its tokens, the number of its first one in the mask, its first
            program, its first slot, the blocks of a program, and the first token of each part,
            as :func:`count` reads them; if ``COUNTED``, int64 on the device, behind one that
            :func:`join` reads.
        slots: of a head.
        heads: of a sequence.
        SECTIONS: how each section is read.
        MASK: 0 for none.
        UPCAST: multiply in float32.
        COUNTED: whether counts are on the device.
        EARLY: this kernel and the one that follows are launched before the one in front has ended.
    """
    if EARLY:
        gdc_launch_dependents()
    if COUNTED:
        if EARLY:
            gdc_wait()
        counts = _counts_in_memory(counts, SECTIONS)
    program = tl.program_id(0)
    group = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    for s in tl.static_range(length(SECTIONS)):
        first_head = group * SECTIONS[s].heads
        row = (batch * heads + first_head) * slots
        split = program - count(counts[s], 2)
        if (split >= 0) & (
            split * count(counts[s], 4) * SECTIONS[s].rows * SECTIONS[s].tokens
            < count(counts[s], 0)
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
                element(SECTIONS, s),
                MASK,
                UPCAST,
                EARLY,
            )


@triton.jit(do_not_specialize=["slots"], do_not_specialize_on_alignment=["slots"])
def join(
    out,
    most,
    norm,
    output,
    slots,
    counts,
    WIDTH: tl.constexpr,
    ROOM: tl.constexpr,
    STEP: tl.constexpr,
    COUNTED: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Join what the programs left: ``output`` [b, h, v], programs are heads x ROOM dimensions.

    If ``COUNTED``, ``counts`` says in how many slots something was left.
    """
    if EARLY:
        gdc_wait()
    left = slots
    if COUNTED:
        left = tl.load(counts).to(tl.int32)
    row = tl.program_id(0).to(tl.int64)
    dims = tl.program_id(1) * ROOM + tl.arange(0, ROOM)
    top = -1e30
    total = 0.0
    found = tl.zeros([ROOM], tl.float32)
    for first in tl.range(0, left, STEP):
        slot = first + tl.arange(0, STEP)
        inside = slot < left
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
    found = found / tl.where(total > 0.0, total, 1.0)  # 0 where nothing was attended to
    tl.store(output + row * WIDTH + dims, found, mask=dims < WIDTH)
