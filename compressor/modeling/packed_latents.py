"""What a packed cache hands to attention: latents that are read in blocks, never as a whole.

Tokens are numbered from the first of the sequence. A part that is not packed has all of them exact.
Of a packed part the sinks are exact, then come the packed tokens, then those that are exact because
they are new. Which of its tokens are packed for a query depends on how many tokens it sees: tokens
of the query's own chunk age as they would one by one, so a chunk that is read at once keeps some
tokens in both forms.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .quantizer import Packed, Quantizer, in_dtype
from .schemes import packed_tokens
from .step_counts import StepCounts

UNREADABLE = (
    "these keys and values are packed in a few bits, which only the attention implementation "
    "'vdcompress' reads: load the model without attn_implementation"
)


@dataclass(frozen=True)
class Ageing:
    """Which tokens of a part are packed once a sequence has so many.

    Attributes:
        token_block: tokens that share a scale; 0 for a part that is not packed.
        sinks: first tokens that stay exact.
        window: newest tokens that stay exact.
    """

    token_block: int
    sinks: int = 0
    window: int = 0

    @property
    def at_once(self) -> bool:
        """Whether a token behind the sinks is packed as soon as it is written."""
        return self.token_block == 1 and not self.window

    def packed_stop(self, tokens: int) -> int:
        """Return one past the last packed token of so many, at least the number of sinks."""
        if not self.token_block:
            return 0
        return self.sinks + packed_tokens(tokens, self.token_block, self.sinks, self.window)

    def packed_stops(self, tokens: Tensor) -> Tensor:
        """Return :meth:`packed_stop` of each number of tokens."""
        block = max(self.token_block, 1)
        aged = (tokens - self.sinks - self.window).clamp_min(0)
        return self.sinks + aged // block * block if self.token_block else torch.zeros_like(tokens)


@dataclass(frozen=True)
class StoredPart:
    """One part of a side.

    Attributes:
        width: numbers per latent.
        ageing: which tokens are packed.
        sinks: the first tokens [b, g, sinks, width]; empty for a part that is not packed.
        packed: the tokens behind the sinks; None where none are.
        packed_stop: one past the last packed token.
        exact: the tokens from ``exact_start`` on [b, g, tokens, width]; some may be packed too.
        exact_start: number of its first token.
        quantizer: of the packed tokens, None for a part that is not packed.
    """

    width: int
    ageing: Ageing
    sinks: Tensor
    packed: Packed | None
    packed_stop: int
    exact: Tensor
    exact_start: int
    quantizer: Quantizer | None

    def is_packed(self, token: int) -> bool:
        """Whether a token is packed for the newest query."""
        return self.ageing.sinks <= token < self.packed_stop

    def of_packed(self, start: int, stop: int) -> tuple[Quantizer, Packed, int, int]:
        """Return what reads packed tokens, the whole blocks that hold them, and what is too much.

        The last two are the tokens in front of ``start`` and behind ``stop``.
        """
        if self.packed is None or self.quantizer is None:
            raise ValueError("none of these tokens is packed")
        first, block = self.ageing.sinks, self.ageing.token_block
        before, behind = (start - first) % block, (first - stop) % block
        found = self.packed.tokens(start - before - first, stop + behind - first, block)
        return self.quantizer, found, before, behind

    def of_exact(self, start: int, stop: int) -> Tensor:
        """Return tokens that are stored as they are, [b, g, stop - start, width]."""
        if stop <= self.ageing.sinks:
            return self.sinks[:, :, start:stop]
        return self.exact[:, :, start - self.exact_start : stop - self.exact_start]

    def read(self, start: int, stop: int) -> Tensor:
        """Return tokens as the newest query sees them, [b, g, stop - start, width]."""
        first, last = self.ageing.sinks, max(self.ageing.sinks, self.packed_stop)
        segments = (
            (0, first, self.of_exact),
            (first, last, self.unpacked),
            (last, stop, self.of_exact),
        )
        pieces = [
            read(max(low, start), min(high, stop))
            for low, high, read in segments
            if max(low, start) < min(high, stop)
        ]
        return torch.cat(pieces, dim=2)

    def unpacked(self, start: int, stop: int) -> Tensor:
        """Return packed tokens as numbers of the model's dtype, [b, g, stop - start, width]."""
        quantizer, packed, before, _ = self.of_packed(start, stop)
        found = in_dtype(quantizer.dequantize(packed, self.width), self.exact.dtype)
        return found[:, :, before : before + stop - start]


class Counted(NamedTuple):
    """Where the numbers are that a kernel counts, and what returns keys and values to count."""

    counts: StepCounts
    stored: Callable[[], tuple[Any, Any]]


class PackedLatents:
    """Keys or values [b, g, tokens, width] of a packed layer: its parts side by side.

    It has the shape, dtype and device of a tensor, and nothing else of one: whatever would read it
    as a tensor fails with a message that says why.

    Args:
        parts: of the side.
        tokens: of the sequence.
        counted: what a kernel counts is on the device; tensors then are all memory that there is,
            and only that kernel knows how much of it to read.
    """

    def __init__(
        self, parts: tuple[StoredPart, ...], tokens: int, counted: Counted | None = None
    ) -> None:
        exact, self.counted = parts[0].exact, counted
        self.parts, self.dtype, self.device = parts, exact.dtype, exact.device
        width = sum(part.width for part in parts)
        self.shape = torch.Size((*exact.shape[:2], tokens, width))

    @property
    def tokens(self) -> int:
        """Tokens of the sequence."""
        return self.shape[2]

    def dequantize(self, start: int, stop: int) -> Tensor:
        """Return tokens as the newest query sees them, [b, g, stop - start, width]."""
        return torch.cat([part.read(start, stop) for part in self.parts], dim=-1)

    def __getattr__(self, name: str) -> Any:
        """Refuse whatever a tensor could do."""
        raise AttributeError(UNREADABLE if hasattr(Tensor, name) else name)

    def __getitem__(self, _index: Any) -> Any:
        """Refuse to be indexed like a tensor."""
        raise TypeError(UNREADABLE)

    @classmethod
    def __torch_function__(cls, *_args: Any, **_kwargs: Any) -> Any:
        """Refuse to be an argument of torch's functions."""
        raise TypeError(UNREADABLE)
