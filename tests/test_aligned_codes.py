"""Codes aligned for products, and what quantisers read from them."""

from __future__ import annotations

import pytest
import torch

from vdcompress.modeling.aligned_codes import RUNS, Aligner, runs
from vdcompress.modeling.packed_levels import Levels
from vdcompress.modeling.packed_products import scores, weighted_sum
from vdcompress.modeling.packing import pack
from vdcompress.modeling.quantizers import quantizer
from vdcompress.modeling.schemes import SCHEMES, packed_width

KNOWN = [(name, bits) for name, found in SCHEMES.items() for bits in found.bits]
PER_TOKEN = [(name, bits) for name, bits in KNOWN if SCHEMES[name].token_block == 1]


@pytest.mark.parametrize("bits", [4, 3, 2])
@pytest.mark.parametrize("n", [8, 40, 24, 192, 5, 1])
@pytest.mark.parametrize("tokens", [1, 7, 130])
def test_every_code_is_aligned_once(bits: int, n: int, tokens: int) -> None:
    codes = torch.randint(0, 2**bits, (3, tokens, n), dtype=torch.uint8)
    size = packed_width(n, bits)
    out = torch.full((len(RUNS[bits]), 3, tokens, size), 255, dtype=torch.uint8)
    Aligner(bits, size, 200, codes.device)(pack(codes, bits), out)
    found = torch.zeros_like(codes)
    for plane, columns, own in runs(bits, n):
        found[..., own] += out[plane, ..., columns]
    assert torch.equal(found, codes << 8 - bits)
    assert not (out & 2 ** (8 - bits) - 1).any()


@pytest.mark.parametrize(("name", "bits"), PER_TOKEN)
def test_aligned_codes_are_read_as_codes_are(name: str, bits: int) -> None:
    rounding = quantizer(name, bits)
    codes = torch.arange(2**bits)
    out = torch.empty(len(codes))
    rounding.read_aligned((codes << 8 - bits).to(torch.uint8), out)
    torch.testing.assert_close(out * rounding.aligned_unit, rounding.levels(codes.float()))


@pytest.mark.parametrize(("name", "bits"), KNOWN)
@pytest.mark.parametrize("width", [40, 72, 192])
@pytest.mark.parametrize("rows", [1, 6])
def test_products_in_several_pieces(name: str, bits: int, width: int, rows: int) -> None:
    rounding, tokens = quantizer(name, bits), 6016
    packed = rounding.quantize(torch.randn(2, 1, tokens, width) + 0.3)
    latents = rounding.dequantize(packed, width).double()
    query, weights = torch.randn(2, 1, rows, width), torch.rand(2, 1, rows, tokens)
    expected = query.double() @ latents.mT
    torch.testing.assert_close(
        scores(rounding, packed, query).double(), expected, rtol=1e-4, atol=1e-4
    )
    found = weighted_sum(rounding, packed, weights, width)
    torch.testing.assert_close(found.double(), weights.double() @ latents, rtol=1e-4, atol=2e-3)


def test_pieces_share_their_memory() -> None:
    rounding = quantizer("normal", 3)
    packed = rounding.quantize(torch.randn(1, 8, 8192, 40))
    levels = Levels(rounding, packed, 40, torch.float32)
    starts, places = zip(*((start, some.data_ptr()) for start, _, some in levels), strict=True)
    assert len(starts) > 2
    assert len(set(places)) == 1
