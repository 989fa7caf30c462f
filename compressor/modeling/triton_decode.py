"""Decoding over latents in few bits on CUDA: what the kernels are given, and how work is split.

A sequence is a few spans of tokens, :mod:`decode_spans`. A span is split among programs, and a
second kernel joins what they leave. Shapes: b sequences, h query heads, g latents of a part,
s tokens, k and v widths. Nothing here reads a tensor on the host, and what is allocated depends on
shapes alone, so that a CUDA graph may hold it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .decode_kernels import attend, join
from .decode_sections import Query, form_of, sections_for
from .decode_settings import LEAST_BLOCKS, Settings
from .decode_spans import HALVES, PartTokens, Span, exact, spans_of
from .decode_tiles import Section, power_of_two
from .packed_latents import Counted, PackedLatents

INTERPRETED = type(attend).__name__ == "InterpretedFunction"
MOST_HEADS = 64  # of one latent, whose queries are held at once
MANY_PROGRAMS = 8  # of a pair: enough that short spans have some of their own
JOINED_NUMBERS = 8192  # that a program joins at a time, at most
FEW_NUMBERS = 1024  # that one joins if its slots are few: one warp has no other to wait for
LEAST_JOINED = 16  # dimensions of a program that joins
NUMBERS_OF_WARP = 2048  # that it holds


def attend_packed(
    query: Tensor, key: PackedLatents, value: PackedLatents, mask: Tensor | None, scaling: float
) -> Tensor | None:
    """Attend over packed latents as :func:`decode` does; None where it cannot."""
    if not can_decode(query, [part.exact for part in (*key.parts, *value.parts)]):
        return None
    if key.counted and not key.counted.counts.masked:
        mask = None
    return decode(query, spans_of(key, value), mask, scaling, counted=key.counted)


def attend_exact(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float
) -> Tensor | None:
    """Attend over latents [b, g, s, width] in 16 bits as :func:`decode` does; None if it cannot."""
    if not can_decode(query, [key, value]):
        return None
    return decode(query, [Span(0, key.shape[2], (exact(key),), exact(value))], mask, scaling)


def can_decode(query: Tensor, exact_numbers: Sequence[Tensor]) -> bool:
    """Whether :func:`decode` knows a case: one query in 16 bits, and numbers of its dtype."""
    groups = min(x.shape[1] for x in exact_numbers)
    return (
        query.shape[2] == 1
        and query.dtype in HALVES
        and all(x.dtype == query.dtype for x in exact_numbers)
        and query.shape[1] // groups <= MOST_HEADS
        and not query.requires_grad
    )


def decode(
    query: Tensor,
    spans: Sequence[Span],
    mask: Tensor | None,
    scaling: float,
    *,
    settings: Settings | None = None,
    counted: Counted | None = None,
) -> Tensor:
    """Attend with one query for each sequence.

    Args:
        query: [b, h, 1, k], fp16 or bf16.
        spans: all tokens; what a sequence has of each part is in few tensors.
        mask: None, or boolean (True attends) or additive, broadcastable to [b, h, 1, s].
        scaling: factor of the scores.
        settings: how work is cut; the table's for these shapes if not given.
        counted: where what changes from step to step is read; the tensors of ``spans`` must not.

    Returns:
        The output [b, h, 1, v] in the query's dtype; 0 where nothing may be attended to.
    """
    b, h, _, k = query.shape
    query = query if query.stride(-1) == 1 else query.contiguous()
    groups = min(part.codes.shape[1] for part in spans[0].parts)
    sections, settings = sections_for(
        tuple(map(form_of, spans)), Query(h // groups, groups, k, query.stride(1)), settings
    )
    cut = Cut(sections, settings, b * groups, query.device)
    if counted is None:
        one = cut.of(spans)
        programs, slots, counts = one.programs, one.slots, tuple(map(as_odd, one.counts))
    else:
        programs, slots = cut.programs, cut.slots
        counts = counted.counts.of_cut(cut, counted.stored)
    width = sections[0].values.width
    left = torch.empty(b * h * slots * (width + 2), dtype=torch.float32, device=query.device)
    out, most, norm = left.split([b * h * slots * width, b * h * slots, b * h * slots])
    kind, mask, mask_b, mask_h = _mask(mask, query)
    output = torch.empty(b, h, 1, width, dtype=query.dtype, device=query.device)
    early = launches_early(query.device)
    room = min(power_of_two(width), max(LEAST_JOINED, FEW_NUMBERS // power_of_two(slots)))
    step = min(power_of_two(slots), JOINED_NUMBERS // room)
    ahead: dict[str, Any] = {"launch_pdl": True} if early else {}
    sizes = {"WIDTH": width, "ROOM": room, "STEP": step, "EARLY": early}
    with torch.cuda.device_of(query):
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
            COUNTED=counted is not None,
            EARLY=early,
            num_warps=settings.warps,
            num_stages=settings.stages,
            maxnreg=settings.registers,
            **ahead,
        )
        join[(b * h, -(-width // room))](
            out,
            most,
            norm,
            output,
            slots,
            out if counted is None else counts,
            **sizes,
            COUNTED=counted is not None,
            num_warps=max(1, room * step // NUMBERS_OF_WARP),
            **ahead,
        )
    return output


class Split(NamedTuple):
    """What the kernel counts of each span, how many programs a pair has, and slots a head."""

    counts: tuple[tuple[int, ...], ...]
    programs: int
    slots: int


@dataclass(frozen=True)
class Cut:
    """How the tokens of a layout are split among programs.

    Attributes:
        sections: how spans are read.
        settings: of the kernel.
        pairs: of a sequence and a group of heads.
        device: whose multiprocessors work.
    """

    sections: tuple[Section, ...]
    settings: Settings
    pairs: int
    device: torch.device

    @property
    def programs(self) -> int:
        """Programs of a pair, at most."""
        return max(1, round(multiprocessors(self.device) * self.settings.programs / self.pairs))

    @property
    def together(self) -> bool:
        """Whether programs of the longest span read the others too.

        Where a pair has few programs: short spans' own would only begin when a place is free.
        """
        return self.programs < MANY_PROGRAMS

    @property
    def slots(self) -> int:
        """Slots of a head, at most."""
        rows = [section.tokens for section in self.sections]
        return self.programs * (sum(rows) if self.together else max(rows))

    def of(self, spans: Sequence[Span]) -> Split:
        """Return what these spans need."""
        others = 0 if self.together else len(spans) - 1
        share = -(-sum(span.tokens for span in spans) // (self.programs - others))
        each = [max(LEAST_BLOCKS, -(-share // section.block)) for section in self.sections]
        needed = [
            -(-span.tokens // (section.block * blocks))
            for span, section, blocks in zip(spans, self.sections, each, strict=True)
        ]
        programs = max(needed) if self.together else sum(needed)
        counts, program, slot = [], 0, 0
        for index, (span, section) in enumerate(zip(spans, self.sections, strict=True)):
            firsts = (part.first for part in span.parts)
            first = min(program, programs - needed[index])
            counts.append((span.tokens, span.start, first, slot, each[index], *firsts))
            program += needed[index]
            slot += needed[index] * section.tokens
        return Split(tuple(counts), programs, slot)

    def numbers(self, key: PackedLatents, value: PackedLatents) -> list[int]:
        """Return what the kernels read on the device: the slots, and the counts."""
        split = self.of(spans_of(key, value))
        return [split.slots, *(number for own in split.counts for number in as_odd(own))]


def as_odd(counts: Sequence[int]) -> tuple[int, ...]:
    """Return odd numbers above 1 that stand for these.

    Triton compiles a kernel for each pattern of numbers in a tuple that are 1 or divide by 16,
    while tokens are counted and a model decodes.
    """
    return tuple(2 * number + 3 for number in counts)


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
    mask = mask.expand(*query.shape[:3], mask.shape[-1])
    mask = mask if mask.stride(-1) == 1 else mask.contiguous()
    kind = 1 if mask.dtype == torch.bool else 2
    return kind, mask.view(torch.uint8) if kind == 1 else mask, mask.stride(0), mask.stride(1)


@cache
def launches_early(device: torch.device) -> bool:
    """Whether a kernel may be launched while the one that it waits for still runs: from Hopper on.

    Programmatic dependent launch, CUDA C++ Programming Guide; it hides the launch of both kernels.
    """
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@cache
def multiprocessors(device: torch.device) -> int:
    """Return how many multiprocessors a device has."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count
