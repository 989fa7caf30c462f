"""The packing kernel writes what the quantisers do, bit by bit: on CUDA, or else interpreted."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

CUDA = torch.cuda.is_available()
pytest.importorskip("triton", minversion=None if CUDA else "3.9", reason="needs Triton")

from vdcompress.modeling import packed_rooms, triton_quantize  # noqa: E402
from vdcompress.modeling.layout import Part  # noqa: E402
from vdcompress.modeling.packed_cache import PackedPart  # noqa: E402
from vdcompress.modeling.packed_rooms import PackedRooms  # noqa: E402
from vdcompress.modeling.quantizers import quantizer  # noqa: E402
from vdcompress.modeling.schemes import SCHEMES  # noqa: E402
from vdcompress.modeling.triton_quantize import can_quantize, quantize_into  # noqa: E402

DEVICE = "cuda" if CUDA else "cpu"
PER_TOKEN = [(s.name, bits) for s in SCHEMES.values() if s.token_block == 1 for bits in s.bits]
WIDTHS = (1, 24, 40, 64, 192)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture
def by_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let rooms be written by the kernel on whatever device tests run."""

    def packed(q: packed_rooms.Quantizer, new: Tensor, into: packed_rooms.Packed) -> bool:
        if can_quantize(q):
            quantize_into(q, new, into)
        return can_quantize(q)

    monkeypatch.setattr(packed_rooms, "_packed_by_kernel", packed)


def latents(*shape: int) -> Tensor:
    """Return numbers of very different sizes, [b, g, s, w] out of a wider tensor."""
    draw = torch.Generator().manual_seed(sum(shape))
    b, g, s, w = shape
    wide = torch.randn(b, s, g, w + 3, generator=draw) * 10 ** torch.randn(
        b, s, g, 1, generator=draw
    )
    return wide[..., 2 : w + 2].transpose(1, 2) + 3.0


def check(name: str, bits: int, x: Tensor) -> None:
    q = quantizer(name, bits)
    rooms = PackedRooms(q)
    for piece in x.to(DEVICE).split(2, dim=2):
        rooms.append(piece)
    for found, expected in zip(rooms.shown, q.quantize(x), strict=True):
        assert (found is None) == (expected is None)
        if found is not None and expected is not None:
            assert torch.equal(found.cpu(), expected)


@pytest.mark.usefixtures("by_kernel")
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize(("name", "bits"), PER_TOKEN)
def test_every_scheme_packs_the_same_bits(name: str, bits: int, width: int) -> None:
    dtype = DTYPES[(bits + width) % len(DTYPES)]
    check(name, bits, latents(2, 3, 5, width).to(dtype))


@pytest.mark.usefixtures("by_kernel")
@pytest.mark.parametrize(("name", "bits"), PER_TOKEN)
def test_several_latents_of_a_program(
    monkeypatch: pytest.MonkeyPatch, name: str, bits: int
) -> None:
    monkeypatch.setattr(triton_quantize, "FEW_LATENTS", 0)
    check(name, bits, latents(2, 3, 5, 40))


@pytest.mark.usefixtures("by_kernel")
@pytest.mark.parametrize(("name", "bits"), PER_TOKEN)
def test_numbers_at_the_ends(name: str, bits: int) -> None:
    x = latents(1, 1, 6, 40)
    x[:, :, 0] = 0
    x[:, :, 1] = 1e-30
    x[:, :, 2] = 3e38
    x[:, :, 3, ::2] = -1e9
    x[:, :, 4] = 7.25
    check(name, bits, x)


@pytest.mark.usefixtures("by_kernel")
@pytest.mark.parametrize(("name", "bits"), PER_TOKEN)
def test_what_is_not_a_number_stays_so(name: str, bits: int) -> None:
    x = latents(1, 1, 3, 72)
    x[:, :, 1, 5] = float("nan")
    q = quantizer(name, bits)
    rooms = PackedRooms(q)
    rooms.append(x.to(DEVICE))
    read, expected = (q.dequantize(packed, 72).cpu() for packed in (rooms.shown, q.quantize(x)))
    assert torch.equal(read.isnan(), expected.isnan())
    assert read[:, :, 1].isnan().any()
    assert not read[:, :, ::2].isnan().any()


@pytest.mark.usefixtures("by_kernel")
def test_a_part_of_a_cache_is_the_same_by_kernel_and_without() -> None:
    part = Part(groups=2, width=40, quantizer="per_token", bits=4)
    by_kernel, x = PackedPart(part, sinks=2, window=3), latents(2, 2, 12, 40).to(DEVICE)
    for piece in x.split([6, 1, 1, 4], dim=2):
        stored = by_kernel.append(piece)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed_rooms, "_packed_by_kernel", lambda *_: False)
        expected = PackedPart(part, sinks=2, window=3).append(x)
    assert torch.equal(stored.read(0, 12), expected.read(0, 12))


def test_scales_of_several_tokens_are_left_to_the_quantiser() -> None:
    assert not can_quantize(quantizer("per_channel", 4))
