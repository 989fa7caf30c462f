"""The kernels of :mod:`numba_decode`: one query attends over latents on a CPU.

A unit of work is some tokens of one sequence and one group of heads. Latents are unpacked a few
tokens at a time into levels, float32, that stay in a processor's nearest memory; all heads of the
group read them there. Where few heads share a latent, bfloat16 numbers and codes of 8 and 4 bits
become levels on their way into a product, and are written nowhere. A unit leaves the weighted sum
of its values beside its norm and the power of two that both are relative to, and :func:`join`
joins them. Scales and zero points of tokens are taken out of the products, as in
:mod:`packed_products`.

All jitted functions are in this file because numba's cache looks at one file only; what makes
LLVM's instructions is in :mod:`numba_lanes`. Letters: r rows
(queries of a group), n tokens, w width, B blocks of D dimensions that share a scale.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from .numba_compiled import compiled
from .numba_lanes import (
    added,
    as_number,
    high_lanes,
    holds_two,
    keep,
    lanes,
    spread,
    sum_of,
    unpacked,
)

try:
    import numba
    import numpy as np
    from numba.extending import overload
except ImportError as missing:
    raise ImportError("the package numba is not installed, or too old for numpy") from missing

FORMS = (FLOAT32, BFLOAT16, FLOAT16, TOKEN_FORM, NORMAL_FORM, CHANNEL_FORM) = range(6)
FIELDS = (  # of a part in the table that a kernel is given; strides and offsets in numbers
    FORM, BITS, WIDTH, LATENTS, FIRST, BLOCKS, ROW, CODES, CODES_B, CODES_G, SCALE, SCALE_B,
    SCALE_G, ZERO, ZERO_B, ZERO_G,
) = range(16)  # fmt: skip
TOKENS = 32  # a multiple of every scheme's block of tokens
TOGETHER = 8  # tokens that are added at a time
WIDENED_ONCE = 4  # queries of a latent from which on its numbers are written wide, once for all
SPARE = 16  # numbers for each latent, where its codes do not fill their words
LOWEST = np.float32(-1e30)  # of what is not attended to: finite, so that differences are numbers
NOTHING = np.float32(-5e29)  # above that and below any score
SMALLEST = np.float32(-126.0)
HALF_UNIT = np.float32(2.0**112)  # an fp16 number over the float32 with its bits shifted
# 2 ** f for 0 <= f < 1 at Chebyshev's points: 2e-8 of it at most, below float32's own rounding.
_POWERS = np.polynomial.chebyshev.Chebyshev.interpolate(np.exp2, 6, [0, 1])
C = tuple(np.float32(c) for c in _POWERS.convert(kind=np.polynomial.Polynomial).coef)
FAST = {"reassoc", "contract", "nsz", "arcp"}  # what is not finite stays so
MOST_THREADS: int = vars(numba.config)["NUMBA_NUM_THREADS"]


def room_for(step: int, widest: int) -> int:
    """Return how many numbers of room a thread needs: levels, then scales, then factors."""
    return step * (widest + SPARE) + step + max(step, widest)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let kernels run on so many threads, at most :data:`MOST_THREADS`."""
    before = numba.get_num_threads()
    if before == count:  # to say so again takes longer than a small cache
        yield
        return
    numba.set_num_threads(count)
    try:
        yield
    finally:
        numba.set_num_threads(before)


@compiled(fastmath=FAST)
def _dots(q, x, block, out):
    """Write the products [n] of a query [D] with a block of levels [n, B, D].

    Two are summed side by side, or each would wait for the end of the one before.
    """
    whole = x.shape[0] // 2 * 2
    for t in range(0, whole, 2):
        one = two = np.float32(0)
        for j in range(x.shape[2]):
            one += q[j] * as_number(x[t, block, j])
            two += q[j] * as_number(x[t + 1, block, j])
        out[t], out[t + 1] = one, two
    for t in range(whole, x.shape[0]):
        total = np.float32(0)
        for j in range(x.shape[2]):
            total += q[j] * as_number(x[t, block, j])
        out[t] = total


@compiled(fastmath=FAST)
def _four_dots(q, x, block, out):
    """Write the products [4, n] of queries [4, D] with a block of levels [n, B, D]."""
    a, b, c, d = q[0], q[1], q[2], q[3]
    for t in range(x.shape[0]):
        one = two = three = four = np.float32(0)
        for j in range(x.shape[2]):
            number = as_number(x[t, block, j])
            one += a[j] * number
            two += b[j] * number
            three += c[j] * number
            four += d[j] * number
        out[0, t], out[1, t], out[2, t], out[3, t] = one, two, three, four


@compiled(fastmath=FAST)
def _add(out, w, x, block):
    """Add to out [D] a block of levels [n, B, D] times weights [n]."""
    whole = x.shape[0] // TOGETHER * TOGETHER
    for t in range(0, whole, TOGETHER):
        a, b, c, d = w[t], w[t + 1], w[t + 2], w[t + 3]
        e, f, g, h = w[t + 4], w[t + 5], w[t + 6], w[t + 7]
        for j in range(out.shape[0]):
            out[j] += (
                a * as_number(x[t, block, j]) + b * as_number(x[t + 1, block, j])
                + c * as_number(x[t + 2, block, j]) + d * as_number(x[t + 3, block, j])
            ) + (
                e * as_number(x[t + 4, block, j]) + f * as_number(x[t + 5, block, j])
                + g * as_number(x[t + 6, block, j]) + h * as_number(x[t + 7, block, j])
            )  # fmt: skip
    for t in range(whole, x.shape[0]):
        for j in range(out.shape[0]):
            out[j] += w[t] * as_number(x[t, block, j])


@compiled(fastmath=FAST, inline="always")
def _two_more(a, b, q, x, one, other, columns, j, count):
    """Add to sums, side by side, the products of a query with bytes j of two tokens' codes."""
    own = lanes(q, j, count)
    a = added(own, lanes(x, one * columns + j, count), a)
    b = added(own, lanes(x, other * columns + j, count), b)
    own = lanes(q, columns + j, count)
    a = added(own, high_lanes(x, one * columns + j, count), a)
    b = added(own, high_lanes(x, other * columns + j, count), b)
    return a, b


@compiled(fastmath=FAST)
def _dots_of_halves(q, x, out):
    """Write the products [n] of a query [D] with codes of 4 bits, two in a byte [n, 1, D / 2]."""
    n, columns, nothing = x.shape[0], x.shape[2], np.float32(0)
    wide, half = columns // 8 * 8, columns // 4 * 4
    x = x.reshape(x.size)
    for t in range(0, n, 2):
        last = min(t + 1, n - 1)
        a = b = spread(nothing, 8)
        for j in range(0, wide, 8):
            a, b = _two_more(a, b, q, x, t, last, columns, j, 8)
        c = d = spread(nothing, 4)
        if half > wide:
            c, d = _two_more(c, d, q, x, t, last, columns, wide, 4)
        one, two = sum_of(a) + sum_of(c), sum_of(b) + sum_of(d)
        for j in range(half, columns):
            one, two = _two_more(one, two, q, x, t, last, columns, j, 1)
        out[t], out[last] = one, two


@compiled(fastmath=FAST, inline="always")
def _add_some(out, w, x, start, stop, columns, j, count):
    """Add to out the bytes j of some tokens' codes times weights."""
    low, high = lanes(out, j, count), lanes(out, columns + j, count)
    for t in range(start, stop):
        own = spread(w[t], count)
        low = added(own, lanes(x, t * columns + j, count), low)
        high = added(own, high_lanes(x, t * columns + j, count), high)
    keep(out, j, low, count)
    keep(out, columns + j, high, count)


@compiled(fastmath=FAST)
def _add_halves(out, w, x):
    """Add to out [D] codes of 4 bits, two in a byte [n, 1, D / 2], times weights [n]."""
    n, columns = x.shape[0], x.shape[2]
    wide, half = columns // 8 * 8, columns // 4 * 4
    x = x.reshape(x.size)
    for t in range(0, n, TOGETHER):
        stop = min(t + TOGETHER, n)
        for j in range(0, wide, 8):
            _add_some(out, w, x, t, stop, columns, j, 8)
        if half > wide:
            _add_some(out, w, x, t, stop, columns, wide, 4)
        for j in range(half, columns):
            _add_some(out, w, x, t, stop, columns, j, 1)


def products(q, x, block, out):
    """Write the products [n] of a query [D] with a block of what is stored; in kernels alone."""


def four_products(q, x, block, out):
    """Write the products [4, n] of queries [4, D] likewise."""


def weighted(out, w, x, block):
    """Add to out [D] a block of what is stored times weights [n]."""


@overload(products, inline="always")
def _chosen_products(q, x, block, out):
    if x.dtype == numba.int8:
        return lambda q, x, block, out: _dots_of_halves(q, x, out)
    return lambda q, x, block, out: _dots(q, x, block, out)


@overload(four_products, inline="always")
def _chosen_four_products(q, x, block, out):
    if x.dtype == numba.float32:
        return lambda q, x, block, out: _four_dots(q, x, block, out)
    return lambda q, x, block, out: None  # fewer read what is not float32: WIDENED_ONCE


@overload(weighted, inline="always")
def _chosen_weighted(out, w, x, block):
    if x.dtype == numba.int8:
        return lambda out, w, x, block: _add_halves(out, w, x)
    return lambda out, w, x, block: _add(out, w, x, block)


@compiled(fastmath={"nnan", "nsz"})
def _highest(x):
    top = x[0]
    for j in range(x.shape[0]):
        top = max(top, x[j])
    return top


@compiled(fastmath=FAST)
def _powers_of_two(x, top, whole, bits):
    """Write 2 ** (x - top) over x and return their sum; whole, whose bits are bits, is room."""
    for j in range(x.shape[0]):
        power = np.int32(np.floor(max(x[j] - top, SMALLEST)))
        bits[j] = np.uint32(power + np.int32(127)) << np.uint32(23)
    total = np.float32(0)
    for j in range(x.shape[0]):
        own = x[j] - top
        kept = max(own, SMALLEST)
        f = kept - np.floor(kept)
        found = C[0] + f * (C[1] + f * (C[2] + f * (C[3] + f * (C[4] + f * (C[5] + f * C[6])))))
        found = found * whole[j] if own > SMALLEST else own * np.float32(0)  # NaN stays NaN
        x[j] = found
        total += found
    return total


@compiled()
def _widen_bfloat16(x, out):
    for j in range(x.shape[0]):
        out[j] = np.uint32(x[j]) << np.uint32(16)


@compiled()
def _widen_float16(x, out, bits):
    """Write fp16 numbers, uint16, as float32 ones; ``bits`` are those of ``out``.

    A scale of 2 ** 112 makes up for the exponent's other bias, numbers that are not normalised
    included; infinity and NaN, whose exponent is all ones, get the float32's.
    """
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
def _runs(part):
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
def _levels_of_words(part, curve, codes, at, n, runs, room):
    """Return the levels [n, columns, runs] in a row of n latents that begin at ``at``."""
    row = part[ROW]
    columns = row // 3 if runs == 8 else row
    out = room[: n * columns * runs]
    _words(codes[at : at + n * row].reshape(n, row // columns, columns), out, runs)
    if part[FORM] == NORMAL_FORM:
        _bend(out, np.float32((2 ** part[BITS] - 1) / 2), curve[0], curve[1])
    return out


@compiled()
def _bytes(x, out):
    for j in range(x.shape[0]):
        out[j] = np.float32(x[j])


@compiled(fastmath=FAST)
def _bend(x, half, a, b):
    for j in range(x.shape[0]):
        u = x[j] - half
        x[j] = u * (a + b * u * u)


@compiled(fastmath=FAST)
def _by_channel(x, scale, zero, unit):
    for j in range(x.shape[0]):
        x[j] = (x[j] - unit * np.float32(zero[j])) * scale[j]


@compiled()
def _levels(
    part, curve, numbers, halves, codes, scale, zero, at, scale_at, zero_at, n, room, room_bits,
    factors, factor_bits,
):  # fmt: skip
    """Return the levels [n * w] of n latents that begin at ``at``; they may lie in ``room``."""
    form, width, row, bits = part[FORM], part[WIDTH], part[ROW], part[BITS]
    if form == FLOAT32:
        return numbers[at : at + n * row]
    out, stored = room[: n * width], codes[at : at + n * row]
    if form == BFLOAT16:
        _widen_bfloat16(halves[at : at + n * row], room_bits)
    elif form == FLOAT16:
        _widen_float16(halves[at : at + n * row], room, room_bits)
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
        _bend(out, np.float32((2**bits - 1) / 2), curve[0], curve[1])
    elif form == CHANNEL_FORM:
        unit = np.float32(2.0**bits / 256)
        for block in range(n // TOKENS):
            own = scale[scale_at + block * width : scale_at + (block + 1) * width]
            _widen_float16(own, factors, factor_bits)
            zeros = zero[zero_at + block * width : zero_at + (block + 1) * width]
            for t in range(block * TOKENS, (block + 1) * TOKENS):
                _by_channel(out[t * width : (t + 1) * width], factors, zeros, unit)
    return out


@compiled(fastmath=FAST)
def _factors(part, scale, zero, scale_at, zero_at, n, block, scales, bits, zeros):
    """Write the scales and zero points, in levels, of n tokens in one block of dimensions."""
    blocks = part[BLOCKS]
    own = scale[scale_at : scale_at + n * blocks]
    for t in range(n):
        bits[t] = np.uint32(own[t * blocks + block]) << np.uint32(13)
    for t in range(n):
        scales[t] *= HALF_UNIT
    if part[FORM] == TOKEN_FORM:
        unit = np.float32(2.0 ** part[BITS] / 256)
        levels = zero[zero_at : zero_at + n * blocks]
        for t in range(n):
            zeros[t] = unit * np.float32(levels[t * blocks + block])
    else:
        zeros[:n] = np.float32(0)


@compiled(fastmath=FAST)
def _add_scores(scores, query, x, block, scaled, scales, zeros, found):
    """Add to scores [r, n] the products of queries [r, D] with a block of levels [n, B, D]."""
    rows, n = query.shape[0], x.shape[0]
    for r in range(0, rows, 4):
        if r + 4 <= rows:
            four_products(query[r:], x, block, found)
        else:
            for s in range(r, rows):
                products(query[s], x, block, found[s - r])
        for s in range(r, min(r + 4, rows)):
            to, own = scores[s], found[s - r]
            if scaled:
                total = _sum(query[s])
                for t in range(n):
                    to[t] += scales[t] * (own[t] - zeros[t] * total)
            else:
                for t in range(n):
                    to[t] += own[t]


@compiled(fastmath=FAST)
def _sum(x):
    total = np.float32(0)
    for j in range(x.shape[0]):
        total += x[j]
    return total


@compiled(fastmath=FAST)
def _scaled(weights, n, scales, zeros, own):
    """Write n weights times scales, and return their sum with the zero points."""
    lost = np.float32(0)
    for t in range(n):
        own[t] = weights[t] * scales[t]
    for t in range(n):
        lost += own[t] * zeros[t]
    return lost


@compiled(fastmath=FAST)
def _add_values(sums, weights, x, block, scaled, scales, zeros, room):
    """Add to sums [r, B, D] a block of levels [n, B, D] times weights [r, n]."""
    for r in range(sums.shape[0]):
        out, own, lost = sums[r, block], weights[r], np.float32(0)
        if scaled:
            lost = _scaled(own, x.shape[0], scales, zeros, room)
            own = room
        weighted(out, own, x, block)
        if scaled:
            for j in range(out.shape[0]):
                out[j] -= lost


@compiled(fastmath=FAST)
def _weigh(scores, n, marks, sums, room, bits):
    """Make weights of n scores of each row, relative to the marks, which may rise."""
    rows, v = scores.shape[0], sums.shape[0] // scores.shape[0]
    for r in range(rows):
        own = scores[r, :n]
        top = max(marks[r], _highest(own))
        kept = np.float32(2.0) ** (marks[r] - top)
        marks[r] = top
        marks[rows + r] = marks[rows + r] * kept + _powers_of_two(own, top, room, bits)
        if kept != 1:
            for j in range(r * v, (r + 1) * v):
                sums[j] *= kept


@compiled()
def _place(j, runs, size):
    """Return which dimension is number j of a latent in the order of words."""
    return j % runs * (size // runs) + j // runs


@compiled(fastmath=FAST)
def _meet(
    x, part, runs, is_value, query, start, shared, scores, sums, queries, scales, zeros, scale_at,
    zero_at, scale, scale_bits, zero, found,
):  # fmt: skip
    """Let the rows that share a latent, from ``start`` on, meet its levels [n, B, D].

    These are float32, or what is stored as :mod:`numba_lanes` reads it. They are in the order of
    words of so many ``runs``, or of the latent.
    """
    n, blocks, size = x.shape
    size = 2 * size if holds_two(x) else size
    k, v = query.shape[0] // scores.shape[0], sums.shape[0] // scores.shape[0]
    stop = start + shared
    scaled = part[FORM] in (TOKEN_FORM, NORMAL_FORM)
    for block in range(blocks):
        if scaled:
            _factors(
                part, scales, zeros, scale_at, zero_at, n, block, scale, scale_bits, zero
            )  # fmt: skip
        if is_value:
            to = sums[start * v : stop * v].reshape(shared, blocks, size)
            _add_values(to, scores[start:stop], x, block, scaled, scale, zero, found[0])
        else:
            own = queries[: shared * size].reshape(shared, size)
            first = part[FIRST] + block * size
            for r in range(shared):
                for j in range(size):
                    dim = _place(j, runs, size)
                    inside = dim < part[WIDTH]  # the last words may not be full
                    own[r, j] = query[(start + r) * k + first + dim] if inside else np.float32(0)
            _add_scores(scores[start:stop], own, x, block, scaled, scale, zero, found)


@compiled()
def _put_in_order(held, runs, sums, rows):
    """Write sums [r * v] of values that are held in the order of words."""
    size, v = held.shape[0] // rows, sums.shape[0] // rows
    for r in range(rows):
        for j in range(size):
            dim = _place(j, runs, size)
            if dim < v:
                sums[r * v + dim] = held[r * size + j]


@compiled()
def _begin(scores, mask, b, group, low, n):
    """Write to scores [r, n] what the mask adds to them."""
    scores[:] = 0
    if mask.shape[0]:
        own = mask[min(b, mask.shape[0] - 1)]
        for r in range(scores.shape[0]):
            head = min(group * scores.shape[0] + r, own.shape[0] - 1)
            for t in range(n):
                scores[r, t] = own[head, low + t]


@compiled()
def _attend_some(
    query, table, curves, numbers, halves, codes, scales, zeros, mask, rows, b, group, start, stop,
    step, sums, marks, room, room_bits,
):  # fmt: skip
    """Attend with queries [r * k] over the tokens of a unit; sums [r * v], marks [2 * r]."""
    values, most = table.shape[0] - 1, 0
    for p in range(table.shape[0]):
        most = max(most, table[p, WIDTH])
    levels = step * (most + SPARE)
    scale, scale_bits = room[levels:], room_bits[levels:]
    factors, factor_bits = room[levels + step :], room_bits[levels + step :]
    scores, found = np.empty((rows, step), np.float32), np.empty((4, step), np.float32)
    zero, queries = np.zeros(step, np.float32), np.empty(rows * (most + SPARE), np.float32)
    order = _runs(table[values])
    size = -(-table[values, WIDTH] // order) * order
    held = np.empty(rows * size, np.float32) if order > 1 else sums
    held[:] = 0
    marks[:rows] = NOTHING
    marks[rows:] = 0
    for low in range(start, stop, step):
        n = min(step, stop - low)
        _begin(scores, mask, b, group, low, n)
        for p in range(values + 1):
            part, latents, width = table[p], table[p, LATENTS], table[p, WIDTH]
            if width == 0:
                continue
            if p == values:
                _weigh(scores, n, marks, held, room, room_bits)
            form = part[FORM]
            scaled = form in (TOKEN_FORM, NORMAL_FORM)
            blocks, shared = part[BLOCKS] if scaled else 1, rows // latents
            runs = _runs(part)
            size = -(-width // runs) * runs // blocks
            for latent in range(latents):
                g = group * latents + latent
                at = part[CODES] + b * part[CODES_B] + g * part[CODES_G] + low * part[ROW]
                stored = low * blocks if scaled else low // TOKENS * width
                scale_at = part[SCALE] + b * part[SCALE_B] + g * part[SCALE_G] + stored
                zero_at = part[ZERO] + b * part[ZERO_B] + g * part[ZERO_G] + stored
                where = (
                    part, runs, p == values, query, latent * shared, shared, scores, held, queries,
                    scales[p], zeros[p], scale_at, zero_at, scale, scale_bits, zero, found,
                )  # fmt: skip
                few, row = shared < WIDENED_ONCE, part[ROW]
                if few and form == BFLOAT16:
                    x = halves[p][at : at + n * width]
                    _meet(x.reshape(n, blocks, size), *where)
                elif few and form == TOKEN_FORM and part[BITS] == 8:
                    x = codes[p][at : at + n * width]
                    _meet(x.reshape(n, blocks, size), *where)
                elif few and form == TOKEN_FORM and part[BITS] == 4 and 2 * row == size:
                    x = codes[p][at : at + n * row].view(np.int8)
                    _meet(x.reshape(n, 1, row), *where)
                elif runs > 1:
                    x = _levels_of_words(part, curves[p], codes[p], at, n, runs, room)
                    _meet(x.reshape(n, blocks, size), *where)
                else:
                    x = _levels(
                        part, curves[p], numbers[p], halves[p], codes[p], scales[p], zeros[p], at,
                        scale_at, zero_at, n, room, room_bits, factors, factor_bits,
                    )  # fmt: skip
                    _meet(x.reshape(n, blocks, size), *where)
    if order > 1:
        _put_in_order(held, order, sums, rows)


@compiled(parallel=True)
def attend(
    query, table, curves, numbers, halves, codes, scales, zeros, mask, groups, tokens, share, step,
    sums, marks, room, room_bits,
):  # fmt: skip
    """Attend over one span.

    Args:
        query: float32 [b, h * k], times the factor of the scores and the logarithm of e to base 2.
        table: int64 [parts, fields]; the values are the last part.
        curves: float32 [parts, 2], of levels of normal numbers.
        numbers: of each part the memory of its latents as float32, where these are its numbers.
        halves: likewise as uint16, where they have 16 bits.
        codes: likewise as uint8, where they are packed.
        scales: likewise, fp16 numbers as uint16.
        zeros: likewise, uint8.
        mask: float32 [b or 1, h or 1, s], added to scores; [0, 0, 0] for none.
        groups: of heads.
        tokens: of the span.
        share: tokens of a unit, a multiple of :data:`TOKENS`.
        step: tokens that are unpacked at a time.
        sums: float32 [b, groups, splits, r * v], written.
        marks: float32 [b, groups, splits, 2 * r]: the powers of two and the norms, written.
        room: float32 [threads, :func:`room_for` a unit].
        room_bits: the same memory as uint32.
    """
    b, splits, rows = query.shape[0], sums.shape[2], marks.shape[3] // 2
    size = query.shape[1] // groups
    for unit in numba.prange(b * groups * splits):
        split, pair = unit % splits, unit // splits
        group, one = pair % groups, pair // groups
        _attend_some(
            query[one, group * size : (group + 1) * size],
            table, curves, numbers, halves, codes, scales, zeros, mask, rows, one, group,
            min(split * share, tokens), min((split + 1) * share, tokens), step,
            sums[one, group, split], marks[one, group, split],
            room[numba.get_thread_id()], room_bits[numba.get_thread_id()],
        )  # fmt: skip


@compiled(fastmath=FAST)
def join(sums, marks, out):
    """Write the averages [b, groups, r, v] of what the units left."""
    rows, v = out.shape[2], out.shape[3]
    for b in range(out.shape[0]):
        for g in range(out.shape[1]):
            for r in range(out.shape[2]):
                top = NOTHING
                for s in range(sums.shape[2]):
                    top = max(top, marks[b, g, s, r])
                to, norm = out[b, g, r], np.float32(0)
                to[:] = 0
                for s in range(sums.shape[2]):
                    kept = np.float32(2.0) ** (marks[b, g, s, r] - top)
                    norm += kept * marks[b, g, s, rows + r]
                    for j in range(v):
                        to[j] += kept * sums[b, g, s, r * v + j]
                if norm != 0:
                    for j in range(to.shape[0]):
                        to[j] /= norm
