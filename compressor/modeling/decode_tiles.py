"""How a decode kernel cuts packed latents into tiles: tables that are known when it is compiled.

A kernel reads ``tokens`` latents that follow each other as one row of units: 16-bit numbers, or
16-bit words of packed codes (bytes where a latent has an odd number of them, columns of three bytes
for 3 bits). A row is read in pieces, each a power of two of units. A field is one code of a unit;
it is taken out by a shift and a mask, and where it then lies below bit 10 it is read as an fp16
number that is not normalised: the code times ``2 ** (position - 24)``, without a conversion.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, fields
from functools import cached_property

from .quantizer_normal import CUBICS
from .schemes import NORMAL, PER_CHANNEL, SCHEMES, zero_unit

EXACT = "exact"
TWICE = 0x10001  # 16 bits in both halves of 32
COLUMNS = 8  # the least that a matrix unit has beside each other


def _two_halves(number: float) -> int:
    """Return the bits of an fp16 number, twice."""
    return int.from_bytes(struct.pack("<e", number), "little") * TWICE


@dataclass(frozen=True)
class Field:
    """One code of a unit.

    Attributes:
        source: which 16 bits of the unit it is in; 1 only for 3 bits.
        shift: by how much these are shifted.
        position: bit at which the code then begins.
        first: number of the code in the latent's first unit; the next unit's is ``step`` further.
    """

    source: int
    shift: int
    position: int
    first: int


@dataclass(frozen=True)
class Piece:
    """Some units of a row."""

    offset: int
    size: int


@dataclass(frozen=True)
class Tile:
    """How one part is read.

    Attributes:
        form: ``exact`` or the name of a scheme.
        bits: of a number.
        width: numbers per latent.
        latents: latents of one program, side by side.
        first: first dimension of the query that it meets.
        units: per latent.
        unit_bytes: 2, or 1, or 3 for 3 bits.
        step: codes from a unit to the next in one field.
        block: dimensions that share a scale.
        fields: codes of a unit.
        pieces: of a row.
        terms: the products of a row: block of dimensions, number of the piece, of the field.
        whole: rows may be read to their end where only their first token is wanted.
        moved: the first token wanted is not the first one stored.
    """

    form: str
    bits: int
    width: int
    latents: int
    first: int
    units: int
    unit_bytes: int
    step: int
    block: int
    fields: tuple[Field, ...]
    pieces: tuple[Piece, ...]
    terms: tuple[tuple[int, int, int], ...]
    whole: bool = False
    moved: bool = False

    @property
    def exact(self) -> bool:
        """Whether numbers are stored as they are."""
        return self.form == EXACT

    @property
    def by_channel(self) -> bool:
        """Whether a scale belongs to one dimension of several tokens."""
        return self.form == PER_CHANNEL.name

    @property
    def normal(self) -> bool:
        """Whether codes stand for the levels of normal numbers."""
        return self.form == NORMAL.name

    @property
    def has_zero(self) -> bool:
        """Whether there are zero points."""
        return not self.exact and SCHEMES[self.form].zero_bytes > 0

    @property
    def blocks(self) -> int:
        """Scales of a token."""
        return self.width // self.block

    @property
    def token_block(self) -> int:
        """Tokens that share a scale."""
        return 1 if self.exact else SCHEMES[self.form].token_block

    @property
    def mask(self) -> int:
        """Bits of a code."""
        return 2**self.bits - 1

    @property
    def cubic(self) -> tuple[float, float]:
        """Coefficients of the levels of normal numbers."""
        return CUBICS[self.bits]

    def two_numbers(self, field: Field) -> str:
        """Return PTX that makes two numbers, fp16, of a field of two units in one register."""
        lines = [
            f"shr.b32 x, $1, {field.shift};",
            f"and.b32 x, x, {(self.mask << field.position) * TWICE};",
        ]
        if self.normal:
            a, b, thousand = (
                _two_halves(self.cubic[0]),
                _two_halves(self.cubic[1]),
                _two_halves(1024),
            )
            unit, half = _two_halves(2.0**-field.position), _two_halves(self.mask / 2)
            lines += [
                f"or.b32 x, x, {thousand}; mov.b32 y, {thousand}; sub.f16x2 x, x, y;",
                f"mov.b32 y, {unit}; mov.b32 z, {half}; mul.f16x2 x, x, y; sub.f16x2 x, x, z;",
                f"mul.f16x2 y, x, x; mov.b32 z, {b}; mov.b32 w, {a};",
                "fma.rn.f16x2 y, y, z, w; mul.f16x2 x, x, y;",
            ]
        return "{ .reg .b32 x, y, z, w; " + " ".join(lines) + " mov.b32 $0, x; }"

    @property
    def zero_unit(self) -> float:
        """What a zero point's byte counts, in codes."""
        return zero_unit(self.bits)


@dataclass(frozen=True)
class Section:
    """How programs read tokens of which each part has one form.

    Attributes:
        keys: the parts of the keys.
        values: the values.
        heads: of one program.
        tokens: latents of a row.
        rows: of a block, which a program reads at a time.
        columns: heads times tokens, and what fills them up.
        query_width: dimensions of a query.
        query_stride: numbers from one head's query to the next.
    """

    keys: tuple[Tile, ...]
    values: Tile
    heads: int
    tokens: int
    rows: int
    query_width: int
    query_stride: int

    def __hash__(self) -> int:
        """Return what Triton asks for at each launch, to find its kernel: found once."""
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash(tuple(getattr(self, field.name) for field in fields(self)))

    @property
    def columns(self) -> int:
        """Columns of the scores of a block."""
        return max(COLUMNS, power_of_two(self.heads) * self.tokens)

    @property
    def block(self) -> int:
        """Tokens that a program reads at a time."""
        return self.rows * self.tokens

    @property
    def scales_in_words(self) -> bool:
        """Whether scales are read as the words of 4 bytes that they are in.

        Triton reads ahead what is at least 4 bytes side by side, as the zero points of 4 latents
        are. What it does not read ahead is waited for: the hardware tells a few loads apart only,
        so that a product waits for a scale that it has no use for.
        """
        return self.tokens == 1 and not any(part.by_channel for part in (*self.keys, self.values))

    @property
    def scales_ahead(self) -> bool:
        """Whether scales are held from one block to the next, as they are not read ahead else."""
        return self.tokens < 4 and not self.scales_in_words

    @property
    def query_room(self) -> int:
        """The least power of two that holds a query."""
        return power_of_two(self.query_width)

    @property
    def shrinks(self) -> bool:
        """Whether queries become fp16 numbers, whose range is small."""
        return any(not tile.exact for tile in self.keys)


def power_of_two(n: int) -> int:
    """Return the least power of two that is not below ``n``."""
    return 1 << max(0, n - 1).bit_length()
