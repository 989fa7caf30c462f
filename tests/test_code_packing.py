"""Codes go into bytes and come back, without a bit too many."""

from __future__ import annotations

import pytest
import torch

from vdcompress.modeling.packing import pack, unpack
from vdcompress.modeling.schemes import packed_width


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("n", [8, 16, 40, 64, 192, 320, 5, 1])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3, 7)])
def test_codes_come_back(bits: int, n: int, shape: tuple[int, ...]) -> None:
    codes = torch.randint(0, 2**bits, (*shape, n), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (*shape, packed_width(n, bits))
    if n % 8 == 0:
        assert packed.shape[-1] == n * bits // 8
    assert torch.equal(unpack(packed, bits, n), codes)
    as_numbers = unpack(packed, bits, n, torch.bfloat16)
    assert torch.equal(as_numbers, codes.to(torch.bfloat16))


@pytest.mark.parametrize("bits", [4, 3, 2])
def test_the_layout_is_the_documented_one(bits: int) -> None:
    n = 48
    codes = torch.randint(0, 2**bits, (n,), dtype=torch.uint8).tolist()
    runs = {4: 2, 3: 8, 2: 4}[bits]
    columns, size = n // runs, runs * bits // 8
    expected = [0] * (columns * size)
    for j in range(columns):
        word = sum(codes[k * columns + j] << (k * bits) for k in range(runs))
        for byte in range(size):
            expected[byte * columns + j] = (word >> (8 * byte)) & 255
    assert pack(torch.tensor(codes, dtype=torch.uint8), bits).tolist() == expected


def test_a_wrong_number_of_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match="7 bytes do not hold 16 codes of 4 bits"):
        unpack(torch.zeros(7, dtype=torch.uint8), 4, 16)
