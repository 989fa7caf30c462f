"""How rows of packed latents are cut into the tiles of :mod:`decode_tiles`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

from .decode_tiles import COLUMNS, EXACT, Field, Piece, Tile, power_of_two
from .schemes import PER_CHANNEL, SCHEMES, codes_per_word, packed_width

SMALLEST = 16  # units of a piece: the least that a matrix unit adds up
LARGEST = 256
MANTISSA = 10  # bits of an fp16 number below which there is no exponent
WIDEST = 512  # numbers of a row, so that a program's queries and sums fit into its registers
WIDEST_PACKED = 320  # likewise, where codes take room too


@cache
def tile(
    form: str,
    bits: int,
    width: int,
    *,
    tokens: int,
    latents: int,
    first: int = 0,
    whole: bool = False,
    moved: bool = False,
) -> Tile:
    """Return how a part is read ``tokens`` latents at a time; the rest as in :class:`Tile`."""
    if form == EXACT:
        units, unit_bytes, step, fields = width, 2, 1, (Field(0, 0, 0, 0),)
    else:
        units, unit_bytes, step, fields = _packed_units(bits, width)
    shared = form in (EXACT, PER_CHANNEL.name)
    block = width if shared else width // SCHEMES[form].blocks(width)
    spread = _Spread(units, tokens, step, tuple(field.first for field in fields), width, block)
    pieces, terms = spread.pieces()
    return Tile(
        form,
        bits,
        width,
        latents,
        first,
        units,
        unit_bytes,
        step,
        block,
        fields,
        pieces,
        terms,
        whole,
        moved,
    )


def _packed_units(bits: int, width: int) -> tuple[int, int, int, tuple[Field, ...]]:
    """Return the units of a latent, their bytes, the step between them, and their fields."""
    row = packed_width(width, bits)
    if bits == 3:
        columns = row // 3
        places = [(0, k * 3) if k < 5 else (1, k * 3 - 8) for k in range(8)]
        fields = tuple(Field(s, shift, 0, k * columns) for k, (s, shift) in enumerate(places))
        return columns, 3, 1, fields
    unit = 2 if row % 2 == 0 else 1
    columns = -(-width // codes_per_word(bits))
    fields, shift = (), 0
    for offset in range(0, 8 * unit, bits):
        if offset - shift + bits > MANTISSA:
            shift = offset
        first = offset % 8 // bits * columns + offset // 8
        fields += (Field(0, shift, offset - shift, first),)
    return row // unit, unit, unit, fields


@dataclass(frozen=True)
class _Spread:
    """Where the codes of a row are: ``firsts`` is the first code of each field, else as a Tile."""

    units: int
    tokens: int
    step: int
    firsts: tuple[int, ...]
    width: int
    block: int

    def pieces(self) -> tuple[tuple[Piece, ...], tuple[tuple[int, int, int], ...]]:
        """Return the pieces with which the least is multiplied, and their products."""
        found = []
        most = LARGEST
        while most >= SMALLEST:
            pieces = _sizes(self.units * self.tokens, most)
            terms = tuple(
                (block, p, f)
                for p, piece in enumerate(pieces)
                for f, first in enumerate(self.firsts)
                for block in self._blocks(piece, first)
            )
            work = sum(pieces[p].size for _, p, _ in terms)
            found.append((work, len(pieces), pieces, terms))
            most //= 2
        _, _, pieces, terms = min(found, key=lambda each: each[:2])
        return pieces, terms

    def _blocks(self, piece: Piece, first: int) -> list[int]:
        """Return the blocks of dimensions that one field of a piece has codes of."""
        stop = min(piece.offset + piece.size, self.units * self.tokens)
        codes = {first + self.step * (x % self.units) for x in range(piece.offset, stop)}
        return sorted({code // self.block for code in codes if code < self.width})


def _sizes(total: int, most: int) -> tuple[Piece, ...]:
    """Return pieces of powers of two, the last one padded where that wastes little."""
    found: list[Piece] = []
    offset = 0
    while offset < total:
        rest = total - offset
        below = 1 << (rest.bit_length() - 1)
        above = below if below == rest else 2 * below
        size = min(max(above if 4 * above <= 5 * rest else below, SMALLEST), most)
        found.append(Piece(offset, size))
        offset += size
    return tuple(found)


def tokens_per_row(heads: int, widest: int, *, packed: bool) -> int:
    """Return how many latents a row has, so that its products fill a matrix unit's columns.

    Args:
        heads: that share a latent.
        widest: numbers of the widest latent.
        packed: whether any part is.
    """
    tokens = max(1, COLUMNS // power_of_two(heads))
    while tokens > 1 and tokens * widest > (WIDEST_PACKED if packed else WIDEST):
        tokens //= 2
    return tokens
