"""The packed tokens of one part of a layer, in rooms that grow."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .quantizer import Packed, Quantizer
from .room import BLOCK, Room
from .schemes import packed_width

WORTH = 2**17  # numbers of a part on a CPU from which on its kernel is worth loading, or compiling


class PackedRooms:
    """Codes, scales and zero points, each in a :class:`Room`.

    Args:
        quantizer: that packs what is written.
    """

    def __init__(self, quantizer: Quantizer) -> None:
        self.quantizer, self.block = quantizer, quantizer.scheme.token_block
        self.codes, blocks = Room(), max(1, BLOCK // self.block)
        self.scale, self.zero = Room(blocks), Room(blocks)

    @property
    def rooms(self) -> tuple[Room, Room, Room]:
        """All of them."""
        return self.codes, self.scale, self.zero

    @property
    def is_empty(self) -> bool:
        """Whether nothing was ever stored."""
        return self.codes.is_empty

    @property
    def shown(self) -> Packed:
        """What is stored."""
        zero = None if self.zero.is_empty else self.zero.shown
        return Packed(self.codes.shown, self.scale.shown, zero)

    @property
    def whole(self) -> Packed:
        """The rooms to their ends, whatever is there."""
        zero = None if self.zero.is_empty else self.zero.whole
        return Packed(self.codes.whole, self.scale.whole, zero)

    def append(self, new: Tensor) -> None:
        """Pack new tokens [b, g, new, width], whole blocks of them, behind those stored."""
        b, g, tokens, width = new.shape
        scheme, device = self.quantizer.scheme, new.device
        scales = (b, g, tokens // self.block, scheme.blocks(width))
        codes = (b, g, tokens, packed_width(width, self.quantizer.bits))
        into = Packed(
            self.codes.extend(codes, torch.uint8, device),
            self.scale.extend(scales, torch.float16, device),
            self.zero.extend(scales, torch.uint8, device) if scheme.zero_bytes else None,
        )
        if not _packed_by_kernel(self.quantizer, new, into, self.codes.length):
            for room, tensor in zip(into, self.quantizer.quantize(new), strict=True):
                if room is not None:
                    room[:] = tensor

    def reserve(self, tokens: int, ahead: int = 0) -> None:
        """Have room for so many tokens, whole blocks of them, as :meth:`Room.reserve` does."""
        for room, each in zip(self.rooms, (1, self.block, self.block), strict=True):
            if not room.is_empty:
                room.reserve(tokens // each, ahead // each)

    def write(self, x: Tensor, places: Tensor) -> None:
        """Pack one token of ``x`` on CUDA; :meth:`advance` counts it.

        Args:
            x: the first of some tokens [b, g, 1, width].
            places: int64 [2], which one of these it is, and where it goes.
        """
        from .triton_quantize import quantize_into

        quantize_into(self.quantizer, x, self.whole, places)

    def advance(self) -> None:
        """Count a token that was written."""
        for room in self.rooms:
            room.length += not room.is_empty

    def crop(self, tokens: int) -> None:
        """Forget all but the first tokens, whole blocks of them."""
        self.codes.crop(tokens)
        self.scale.crop(tokens // self.block)
        self.zero.crop(tokens // self.block)

    def change(self, change: Callable[[Tensor], Tensor]) -> None:
        """Put what ``change`` makes of each room in its place."""
        for room in self.rooms:
            room.change(change)

    def nbytes(self) -> int:
        """Bytes of what is stored."""
        return sum(room.nbytes() for room in self.rooms)

    def nbytes_allocated(self) -> int:
        """Bytes of the rooms."""
        return sum(room.nbytes_allocated() for room in self.rooms)


def _packed_by_kernel(quantizer: Quantizer, new: Tensor, into: Packed, stored: int) -> bool:
    """Let the device's kernel pack tokens; say whether there is one that can, and is worth it.

    Args:
        quantizer: of the tokens.
        new: [b, g, new, width].
        into: where they are written.
        stored: tokens of each latent, the new ones among them.
    """
    b, g, _, width = new.shape
    if quantizer.scheme.token_block > 1:
        return False
    try:
        if new.is_cuda:
            from .triton_quantize import quantize_into
        elif new.device.type == "cpu" and b * g * stored * width >= WORTH:
            from .numba_quantize import quantize_into
        else:
            return False
    except ImportError:
        return False
    quantize_into(quantizer, new, into)
    return True
