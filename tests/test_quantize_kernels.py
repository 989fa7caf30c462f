"""The packing kernels write what the quantisers do, bit by bit.

Triton's runs on CUDA, or else in its interpreter; numba's on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from vdcompress.modeling import packed_rooms
from vdcompress.modeling.layout import Part
from vdcompress.modeling.packed_cache import PackedPart
from vdcompress.modeling.packed_rooms import PackedRooms
from vdcompress.modeling.quantizers import quantizer
from vdcompress.modeling.schemes import SCHEMES

CUDA = torch.cuda.is_available()
PER_TOKEN = [(s.name, bits) for s in SCHEMES.values() if s.token_block == 1 for bits in s.bits]
WIDTHS = (1, 24, 40, 64, 192)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
every_scheme = pytest.mark.parametrize(("name", "bits"), PER_TOKEN)
Check = Callable[[str, int, Tensor], None]


@pytest.fixture(params=["triton", "numba"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Let rooms be written by one of the kernels, on whatever device tests run."""
    minimum = None if CUDA or request.param == "numba" else "3.9"
    pytest.importorskip(request.param, minversion=minimum, reason=f"needs {request.param}")
    module = import_module(f"vdcompress.modeling.{request.param}_quantize")

    def packed(q: Any, new: Tensor, into: Any, _stored: int) -> bool:
        module.quantize_into(q, new, into)
        return True

    monkeypatch.setattr(packed_rooms, "_packed_by_kernel", packed)
    return module


@pytest.fixture
def device(kernel: ModuleType) -> str:
    return "cuda" if CUDA and "triton" in kernel.__name__ else "cpu"


@pytest.fixture
def check(device: str) -> Check:
    def packs_the_same(name: str, bits: int, x: Tensor) -> None:
        q = quantizer(name, bits)
        rooms = PackedRooms(q)
        for piece in x.to(device).split(2, dim=2):
            rooms.append(piece)
        for found, expected in zip(rooms.shown, q.quantize(x), strict=True):
            assert (found is None) == (expected is None)
            if found is not None and expected is not None:
                assert torch.equal(found.cpu(), expected)

    return packs_the_same


def latents(*shape: int) -> Tensor:
    """Return numbers of very different sizes, [b, g, s, w] out of a wider tensor."""
    draw = torch.Generator().manual_seed(sum(shape))
    b, g, s, w = shape
    sizes = 10 ** torch.randn(b, s, g, 1, generator=draw)
    wide = torch.randn(b, s, g, w + 3, generator=draw) * sizes
    return wide[..., 2 : w + 2].transpose(1, 2) + 3.0


@every_scheme
@pytest.mark.parametrize("width", WIDTHS)
def test_every_scheme_packs_the_same_bits(check: Check, name: str, bits: int, width: int) -> None:
    dtype = DTYPES[(bits + width) % len(DTYPES)]
    check(name, bits, latents(2, 3, 5, width).to(dtype))


@every_scheme
def test_many_latents(
    kernel: ModuleType, check: Check, monkeypatch: pytest.MonkeyPatch, name: str, bits: int
) -> None:
    """One program of Triton's packs several of them."""
    if hasattr(kernel, "FEW_LATENTS"):
        monkeypatch.setattr(kernel, "FEW_LATENTS", 0)
    check(name, bits, latents(2, 3, 5, 40))


@every_scheme
def test_numbers_at_the_ends(check: Check, name: str, bits: int) -> None:
    x = latents(1, 1, 8, 40)
    x[:, :, 0] = 0
    x[:, :, 1] = 1e-30
    x[:, :, 2] = 3e38
    x[:, :, 3, ::2] = -1e9
    x[:, :, 4] = 7.25
    x[:, :, 5] *= 1e-4
    x[:, :, 6] *= 1e-6
    check(name, bits, x)


@every_scheme
@pytest.mark.usefixtures("kernel")
def test_what_is_not_a_number_stays_so(device: str, name: str, bits: int) -> None:
    x = latents(1, 1, 3, 72)
    x[:, :, 1, 5] = float("nan")
    q, rooms = quantizer(name, bits), PackedRooms(quantizer(name, bits))
    rooms.append(x.to(device))
    read, expected = (q.dequantize(packed, 72).cpu() for packed in (rooms.shown, q.quantize(x)))
    assert torch.equal(read.isnan(), expected.isnan())
    assert read[:, :, 1].isnan().any()
    assert not read[:, :, ::2].isnan().any()


@pytest.mark.usefixtures("kernel")
def test_a_part_of_a_cache_is_the_same_by_kernel_and_without(device: str) -> None:
    part = Part(groups=2, width=40, quantizer="per_token", bits=4)
    by_kernel, x = PackedPart(part, sinks=2, window=3), latents(2, 2, 12, 40).to(device)
    for piece in x.split([6, 1, 1, 4], dim=2):
        stored = by_kernel.append(piece)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed_rooms, "_packed_by_kernel", lambda *_: False)
        expected = PackedPart(part, sinks=2, window=3).append(x)
    assert torch.equal(stored.read(0, 12), expected.read(0, 12))


def test_scales_of_several_tokens_are_left_to_the_quantiser(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(packed_rooms, "WORTH", 0)
    q, x = quantizer("per_channel", 4), latents(1, 2, 64, 40)
    rooms = PackedRooms(q)
    rooms.append(x)
    assert all(map(torch.equal, rooms.shown, q.quantize(x)))


def test_a_kernel_on_a_cpu_waits_until_a_cache_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    numba_quantize = pytest.importorskip("vdcompress.modeling.numba_quantize")
    packed: list[int] = []
    monkeypatch.setattr(
        numba_quantize, "quantize_into", lambda _q, x, _into: packed.append(x.shape[2])
    )
    monkeypatch.setattr(packed_rooms, "WORTH", 2 * 40 * 100)
    rooms = PackedRooms(quantizer("per_token", 8))
    for tokens in (98, 1, 1, 3):
        rooms.append(torch.zeros(1, 2, tokens, 40))
    assert packed == [1, 3]
