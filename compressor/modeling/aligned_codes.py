"""Codes of few bits unpacked for products: each to the upper bits of a byte, in the order of bytes.

A code c becomes the byte ``c * 2**(8 - bits)``, beside which zero points, codes of eight bits, count
as they are. One operation takes a code from every byte of all tokens, so that it runs over
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


def align(packed: Tensor, bits: int, out: Tensor) -> None:
    """Write aligned codes.

    Args:
        packed: [..., tokens, bytes].
        bits: of a code.
        out: uint8 [planes, ..., tokens, bytes]; bytes from which a plane takes no code become 0.
    """
    if bits == 3:
        _align_three(packed, out)
        return
    for k, plane in enumerate(out):
        up = 8 - bits - k * bits
        shifted = torch.mul(packed, 2**up, out=plane) if up else packed
        torch.bitwise_and(shifted, 256 - 2 ** (8 - bits), out=plane)


def _align_three(packed: Tensor, out: Tensor) -> None:
    """Align codes of 3 bits: of a byte's eight bits, a code may have some in the next byte."""
    tokens, columns = packed.shape[-2], packed.shape[-1] // 3
    packed, (first, second, across) = packed.flatten(-2), out.flatten(-2)

    def by_byte(*values: int) -> Tensor:
        row = torch.tensor(values, dtype=torch.uint8, device=packed.device)
        some = row.repeat_interleave(columns).repeat(min(tokens, REPEATED))
        return some.repeat(-(-tokens // REPEATED))[: tokens * len(values) * columns]

    torch.mul(packed, by_byte(32, 16, 8), out=first).bitwise_and_(0xE0)
    torch.mul(packed, by_byte(4, 2, 1), out=second).bitwise_and_(0xE0)
    torch.bitwise_right_shift(packed, 2, out=across)
    across.mul_(by_byte(2, 1, 0)).bitwise_and_(by_byte(0x60, 0x20, 0))
    upper = packed[..., columns:] * by_byte(128, 64, 0)[: packed.shape[-1] - columns]
    across[..., : packed.shape[-1] - columns] += upper
