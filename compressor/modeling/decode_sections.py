"""How the spans of a cache become sections of the decode kernel, found once for each layout.

What changes from token to token is not in here, so that a step finds its sections by a look at a
table, and Triton its kernel by one at theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from torch import Tensor

from .decode_cutting import tile, tokens_per_row
from .decode_settings import BY_CHANNEL, Settings, settings_for
from .decode_spans import PartTokens, Span
from .decode_tiles import COLUMNS, EXACT, Section, Tile
from .schemes import GROUP_TOKENS, PER_CHANNEL, packed_width

KNOWN = 1024  # layouts whose sections are kept


class PartForm(NamedTuple):
    """How one part of a span is stored.

    Attributes:
        form: ``exact`` or the name of a scheme.
        bits: of a number.
        width: numbers per latent.
        latents: of a sequence.
        whole: there is memory for a whole row of tokens where some of them are.
        moved: the first token wanted is not the first one stored.
    """

    form: str
    bits: int
    width: int
    latents: int
    whole: bool
    moved: bool

    @property
    def nbytes(self) -> int:
        """Bytes of the numbers or codes of one latent."""
        return 2 * self.width if self.form == EXACT else packed_width(self.width, self.bits)


Form = tuple[PartForm, ...]  # of a span: the parts of its keys, and its values


class Query(NamedTuple):
    """What a program reads of queries.

    Attributes:
        heads: that read the latents of a program.
        groups: of a sequence.
        width: dimensions of a query.
        stride: numbers from one head's query to the next.
    """

    heads: int
    groups: int
    width: int
    stride: int


def form_of(span: Span) -> Form:
    """Return how a span is stored."""
    return tuple(
        PartForm(
            part.form,
            part.bits,
            part.width,
            part.codes.shape[1],
            part.form != EXACT and not part.moved and _rows_have_room(part, span.tokens),
            part.moved,
        )
        for part in span.parts
    )


@lru_cache(KNOWN)
def sections_for(
    forms: tuple[Form, ...], query: Query, settings: Settings | None
) -> tuple[tuple[Section, ...], Settings]:
    """Return how each span is read, and the settings: the table's if none are given."""
    main = _most_packed(forms)
    settings = settings or settings_of(main, query.heads)
    most = _tokens_per_row(main, query.heads) * _nbytes(main)
    return tuple(_section(form, most, settings.rows, query) for form in forms), settings


def table_settings(spans: Sequence[Span], heads: int) -> Settings:
    """Return the table's settings for spans of latents that so many heads share."""
    return settings_of(_most_packed([form_of(span) for span in spans]), heads)


def settings_of(main: Form, heads: int) -> Settings:
    """Return the table's settings for the span that most tokens are in."""
    if _by_channel(main):
        return BY_CHANNEL
    return settings_for(tuple(part.bits for part in main), _tokens_per_row(main, heads))


def _section(form: Form, most: int, rows: int, query: Query) -> Section:
    """Return how a span is read: rows of at most so many bytes, but for those of one token."""
    tokens = _tokens_per_row(form, query.heads)
    while tokens > 1 and tokens * _nbytes(form) > most:
        tokens //= 2
    tiles: list[Tile] = []
    for part in form:
        tiles.append(
            tile(
                part.form,
                part.bits,
                part.width,
                tokens=tokens,
                latents=part.latents // query.groups,
                first=sum(before.width for before in tiles),
                whole=part.whole,
                moved=part.moved,
            )
        )
    rows = GROUP_TOKENS if _by_channel(form) else rows
    return Section(
        tuple(tiles[:-1]), tiles[-1], query.heads, tokens, rows, query.width, query.stride
    )


def _most_packed(forms: Sequence[Form]) -> Form:
    return max(forms, key=lambda form: sum(part.form != EXACT for part in form))


def _by_channel(form: Form) -> bool:
    return any(part.form == PER_CHANNEL.name for part in form)


def _tokens_per_row(form: Form, heads: int) -> int:
    """Return how many latents a row of a span has."""
    if _by_channel(form):
        return 1
    packed = any(part.form != EXACT for part in form)
    return tokens_per_row(heads, max(part.width for part in form), packed=packed)


def _nbytes(form: Form) -> int:
    return sum(part.nbytes for part in form)


def _rows_have_room(part: PartTokens, tokens: int) -> bool:
    """Whether there is memory for whole rows of a part's tokens, the longest that there are."""
    by_token = () if part.form == PER_CHANNEL.name else (part.scale, part.zero)
    wanted = -(-tokens // COLUMNS) * COLUMNS
    return all(x is None or _has_room(x, wanted) for x in (part.codes, *by_token))


def _has_room(x: Tensor, tokens: int) -> bool:
    """Whether there is memory for so many tokens [b, g, tokens, n], wanted or not."""
    b, g, _, n = x.shape
    of_batch, of_group, *_ = x.stride()
    room = x.untyped_storage().nbytes() // x.element_size()
    return x.storage_offset() + (b - 1) * of_batch + (g - 1) * of_group + tokens * n <= room
