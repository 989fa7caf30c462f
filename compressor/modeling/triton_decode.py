"""Decoding over latents in few bits on CUDA: what the kernels are given, and how work is split.

A sequence is cut into sections: in each, a part has all its tokens in one form (sinks, packed, new
ones that are still exact). A section is split among programs, and a second kernel joins what they
leave. Shapes: b sequences, h query heads, g latents of a part, s tokens, k and v widths. Nothing
here reads a tensor on the host, and what is allocated depends on shapes alone, so that a CUDA graph
may hold it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from .decode_kernels import attend, join
from .decode_settings import Settings, settings_for
from .decode_tiles import EXACT, Section, Tile, power_of_two, tile, tokens_per_row
from .packed_latents import PackedLatents, StoredPart
from .quantizer import Packed
from .schemes import GROUP_TOKENS

INTERPRETED = type(attend).__name__ == "InterpretedFunction"
HALVES = (torch.float16, torch.bfloat16)
MOST_HEADS = 64  # of one latent, whose queries are held at once
JOINED_NUMBERS = 8192  # that are joined at a time


class PartTokens(NamedTuple):
    """Tokens of one part in one form.

    Attributes:
        codes: numbers [b, g, s, width] or packed codes [b, g, s, bytes]; a latent's tokens lie
            behind each other without a gap.
        scale: [b, g, s / token_block, blocks], None for numbers.
        zero: likewise, None where a scheme has none.
        form: ``exact`` or the name of a scheme.
        bits: of a number.
        width: numbers per latent.
        first: the first token wanted.
        moved: whether ``first`` may be another than 0.
    """

    codes: Tensor
    scale: Tensor | None
    zero: Tensor | None
    form: str
    bits: int
    width: int
    first: int = 0
    moved: bool = False


class Span(NamedTuple):
    """Tokens that follow each other, and the form of each part of them.

    Attributes:
        start: number of the first one in the sequence.
        tokens: how many; there may be none.
        keys: the parts of the keys.
        values: the values.
    """

    start: int
    tokens: int
    keys: tuple[PartTokens, ...]
    values: PartTokens

    @property
    def parts(self) -> tuple[PartTokens, ...]:
        """All parts, as a kernel takes them."""
        return (*self.keys, self.values)


def exact(x: Tensor, first: int = 0, *, moved: bool = False) -> PartTokens:
    """Return tokens that are stored as they are, ``x`` [b, g, s, width]."""
    return PartTokens(x, None, None, EXACT, 16, x.shape[-1], first, moved)


def decode(
    query: Tensor,
    spans: Sequence[Span],
    mask: Tensor | None,
    scaling: float,
    *,
    settings: Settings | None = None,
) -> Tensor:
    """Attend with one query for each sequence.

    Args:
        query: [b, h, 1, k], fp16 or bf16.
        spans: all tokens; what a sequence has of each part is in few tensors.
        mask: None, or boolean (True attends) or additive, broadcastable to [b, h, 1, s].
        scaling: factor of the scores.
        settings: how work is cut; the table's for these shapes if not given.

    Returns:
        The output [b, h, 1, v] in the query's dtype; 0 where nothing may be attended to.
    """
    b, h, _, k = query.shape
    query = query if query.stride(-1) == 1 else query.contiguous()
    groups = min(part.codes.shape[1] for part in spans[0].parts)
    settings = settings or settings_for(spans_key(spans), h // groups)
    sections = tuple(_section(span, settings, h // groups, groups, k, query.stride(1)) for span in spans)
    counts, programs, slots = _counts(spans, sections, b * groups, settings, query.device)
    width = sections[0].values.width
    left = torch.empty(b * h * slots * (width + 2), dtype=torch.float32, device=query.device)
    out, most, norm = left.split([b * h * slots * width, b * h * slots, b * h * slots])
    kind, mask, mask_b, mask_h = _mask(mask, query)
    attend[(programs, groups, b)](
        query,
        query.stride(0),
        out,
        most,
        norm,
        mask,
        mask_b,
        mask_h,
        scaling * math.log2(math.e),
        tuple(tuple(map(_pointers, span.parts)) for span in spans),
        counts,
        slots,
        h,
        SECTIONS=sections,
        MASK=kind,
        UPCAST=INTERPRETED,
        num_warps=settings.warps,
        num_stages=settings.stages,
    )
    output = torch.empty(b, h, 1, width, dtype=query.dtype, device=query.device)
    room = power_of_two(width)
    step = min(power_of_two(slots), max(1, JOINED_NUMBERS // room))
    join[(b * h,)](out, most, norm, output, slots, WIDTH=width, ROOM=room, STEP=step)
    return output


def spans_key(spans: Sequence[Span]) -> tuple[tuple[str, int, int], ...]:
    """Return what the settings depend on: form, bits and width of each part of the longest span."""
    longest = max(spans, key=lambda span: span.tokens)
    return tuple((part.form, part.bits, part.width) for part in longest.parts)


def _section(  # noqa: PLR0917
    span: Span, settings: Settings, heads: int, groups: int, width: int, stride: int
) -> Section:
    by_channel = any(part.form == "per_channel" for part in span.parts)
    widest = max(part.width for part in span.parts)
    tokens = 1 if by_channel else tokens_per_row(heads, widest)
    rows = GROUP_TOKENS if by_channel else settings.rows
    tiles, first = [], 0
    for part in span.parts:
        tiles.append(_tile(part, tokens, span.tokens, groups, first))
        first += part.width
    return Section(tuple(tiles[:-1]), tiles[-1], heads, tokens, rows, width, stride)


def _tile(part: PartTokens, tokens: int, stored: int, groups: int, first: int) -> Tile:
    packed = part.form != EXACT
    return tile(
        part.form,
        part.bits,
        part.width,
        tokens=tokens,
        latents=part.codes.shape[1] // groups,
        first=first,
        whole=packed and not part.moved and _whole(part.codes, stored, tokens),
        moved=part.moved,
    )


def _whole(codes: Tensor, stored: int, tokens: int) -> bool:
    """Whether there is memory for as many tokens as fill the last row."""
    last = (-(-stored // tokens) * tokens) * codes.shape[3]
    before = (codes.shape[0] - 1) * codes.stride(0) + (codes.shape[1] - 1) * codes.stride(1)
    room = codes.untyped_storage().nbytes() // codes.element_size()
    return codes.storage_offset() + before + last <= room


def _counts(
    spans: Sequence[Span],
    sections: Sequence[Section],
    pairs: int,
    settings: Settings,
    device: torch.device,
) -> tuple[tuple[tuple[int, ...], ...], int, int]:
    """Return what the kernel counts, how many programs a pair has, and how many slots a head."""
    wanted = max(1, round(multiprocessors(device) * settings.programs / pairs))
    share = -(-sum(span.tokens for span in spans) // wanted)
    counts, program, slot = [], 0, 0
    for span, section in zip(spans, sections, strict=True):
        blocks = -(-span.tokens // section.block)
        each = max(1, -(-share // section.block))
        firsts = (part.first for part in span.parts)
        counts.append((span.tokens, span.start, program, slot, each, *firsts))
        program += -(-blocks // each)
        slot += -(-blocks // each) * section.tokens
    return tuple(counts), program, slot


def _pointers(part: PartTokens) -> tuple[Tensor | int, ...]:
    codes = part.codes
    scale = codes if part.scale is None else part.scale
    zero = scale if part.zero is None else part.zero
    strides = (codes.stride(0), codes.stride(1), scale.stride(0), scale.stride(1))
    return (codes, scale, zero, *strides)


def _mask(mask: Tensor | None, query: Tensor) -> tuple[int, Tensor, int, int]:
    """Return what the kernel does with a mask, the mask, and strides of sequences and heads."""
    if mask is None:
        return 0, query, 0, 0
    mask = mask.expand(query.shape[0], query.shape[1], 1, mask.shape[-1])
    mask = mask if mask.stride(-1) == 1 else mask.contiguous()
    kind = 1 if mask.dtype == torch.bool else 2
    return kind, mask.view(torch.uint8) if kind == 1 else mask, mask.stride(0), mask.stride(1)


@cache
def multiprocessors(device: torch.device) -> int:
    """Return how many multiprocessors a device has."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count
