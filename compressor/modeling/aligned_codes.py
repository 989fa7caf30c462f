"""Codes of few bits unpacked for products: each to the upper bits of a byte, in the order of bytes.

A code c becomes the byte ``c * 2**(8 - bits)``, beside which zero points, codes of eight bits, are
counted as they are. One operation takes a code from every byte of all tokens, so that it runs over
neighbouring bytes however narrow a latent is: that makes a plane of codes. :func:`runs` says which
they are; a product does not mind their order. Codes lie as :mod:`packing` lays them out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .schemes import packed_width, word_bytes

# The runs that each plane takes from the bytes of a word; three bytes hold eight codes of 3 bits.
RUNS: dict[int, tuple[tuple[int, ...], ...]] = {
    8: ((0,),),
    4: ((0,), (1,)),
    3: ((0, 3, 6), (1, 4, 7), (2, 5)),
    2: ((0,), (1,), (2,), (3,)),
}
# For codes of 3 bits, by the byte of a word: what lifts the first and the second code of a byte to
# its upper bits, what lifts the lower bits of a code that goes on in the next byte once they are at
# the bottom, which bits these are, and what lifts its upper bits.
THREE = ((32, 16, 8), (4, 2, 1), (2, 1, 0), (0x60, 0x20, 0), (128, 64, 0))
REPEATED = 64  # tokens that a pattern is spelt out for, then copied


def runs(bits: int, n: int) -> list[tuple[int, slice, slice]]:
    """Return for each run of a latent's n codes its plane, its bytes there, and the codes."""
    columns = packed_width(n, bits) // word_bytes(bits)
    found = []
    for plane, taken in enumerate(RUNS[bits]):
        for byte, run in enumerate(taken):
            first, start = run * columns, byte * columns
            size = min(columns, n - first)
            if size > 0:
                found.append((plane, slice(start, start + size), slice(first, first + size)))
    return found


class Aligner:
    """Writes aligned codes of some tokens after others.

    Args:
        bits: of a code, below 8.
        size: bytes of a latent.
        tokens: the most at a time.
        device: where.
    """

    def __init__(self, bits: int, size: int, tokens: int, device: torch.device) -> None:
        self.bits, self.size = bits, size
        if bits == 3:
            by_byte = torch.tensor(THREE, dtype=torch.uint8, device=device)
            row = by_byte.repeat_interleave(size // 3, dim=1)
            self._patterns = row.repeat(1, REPEATED).repeat(1, -(-tokens // REPEATED))

    def __call__(self, packed: Tensor, out: Tensor) -> None:
        """Align latents.

        Args:
            packed: [..., tokens, bytes].
            out: uint8 [planes, ..., tokens, bytes]; 0 where a plane takes no code from a byte.
        """
        if self.bits == 3:
            self._three(packed.flatten(-2), out.flatten(-2))
            return
        for k, plane in enumerate(out):
            up = 8 - self.bits - k * self.bits
            shifted = torch.mul(packed, 2**up, out=plane) if up else packed
            torch.bitwise_and(shifted, 256 - 2 ** (8 - self.bits), out=plane)

    def _three(self, packed: Tensor, out: Tensor) -> None:
        """Align codes of 3 bits, [..., tokens * bytes]; some have bits in the next byte too."""
        first, second, across = out
        numbers, column = packed.shape[-1], self.size // 3
        patterns = self._patterns[:, :numbers]
        torch.mul(packed, patterns[0], out=first).bitwise_and_(0xE0)
        torch.mul(packed, patterns[1], out=second).bitwise_and_(0xE0)
        torch.bitwise_right_shift(packed, 2, out=across)
        across.mul_(patterns[2]).bitwise_and_(patterns[3])
        next_byte = packed[..., column:]
        across[..., :-column] += next_byte * patterns[4, : numbers - column]
