"""Codes of a few bits, packed into bytes without waste.

A latent of n codes is cut into m runs of n / m codes, where m is as many codes as fill whole
bytes: 1 of 8 bits, 2 of 4, 4 of 2, and 8 of 3 bits in three bytes. Column j holds the j-th code of
every run: run k takes the bits from ``k * bits`` on of a little-endian word. The bytes of a latent
are the lowest bytes of all columns, then the next ones. So a run unpacks by one shift and one mask
of neighbouring bytes into neighbouring numbers, for 8, 4 and 2 bits without exception.

n that is not a multiple of m is padded to one with zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from .schemes import codes_per_word, packed_width, word_bytes


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes, uint8 [..., n] below ``2 ** bits``, into bytes [..., n * bits / 8]."""
    if bits == 8:
        return codes
    runs = codes_per_word(bits)
    columns = -(-codes.shape[-1] // runs)
    padded = functional.pad(codes, (0, columns * runs - codes.shape[-1]))
    run = padded.unflatten(-1, (runs, columns)).unbind(-2)
    planes = []
    for byte in range(word_bytes(bits)):
        plane = torch.zeros_like(run[0])
        for k, offset in _parts(bits, byte):
            plane |= run[k] << offset if offset >= 0 else run[k] >> -offset
        planes.append(plane)
    return torch.cat(planes, dim=-1)


def unpack(packed: Tensor, bits: int, n: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    """Return the n codes [..., n] of each latent in ``packed`` [..., bytes].

    Args:
        packed: what :func:`pack` returned.
        bits: of a code.
        n: codes per latent.
        dtype: of the result.
    """
    runs = unpack_runs(packed, bits, n)
    codes = runs[0] if len(runs) == 1 else torch.cat(runs, dim=-1)[..., :n]
    return codes.to(dtype)


def unpack_runs(packed: Tensor, bits: int, n: int) -> list[Tensor]:
    """Return the runs, uint8, that make up the codes of each latent, one after the other.

    Arguments are those of :func:`unpack`; the last runs may hold codes beyond the n-th.
    """
    if packed.shape[-1] != packed_width(n, bits):
        raise ValueError(f"{packed.shape[-1]} bytes do not hold {n} codes of {bits} bits")
    if bits == 8:
        return [packed]
    runs, mask = codes_per_word(bits), 2**bits - 1
    planes = packed.unflatten(-1, (word_bytes(bits), -1)).unbind(-2)
    found = []
    for k in range(runs):
        byte, offset = divmod(k * bits, 8)
        code = planes[byte] >> offset if offset else planes[byte]
        if offset + bits > 8:
            code = code | planes[byte + 1] << 8 - offset
        found.append(code if offset + bits == 8 else code & mask)
    return found


def _parts(bits: int, byte: int) -> list[tuple[int, int]]:
    """Return which codes of a word have bits in one of its bytes, and where they begin there."""
    offsets = ((k, k * bits - 8 * byte) for k in range(codes_per_word(bits)))
    return [(k, offset) for k, offset in offsets if -bits < offset < 8]
