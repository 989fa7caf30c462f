"""What the decode kernel is told: where codes are in a row, and which tokens are in which form."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.dynamic_module_utils import get_imports, get_relative_import_files

from decode_reference import drawn, sides
from naive_packed import LAYERS
from vdcompress.modeling import attention
from vdcompress.modeling.decode_cutting import MANTISSA, tile, tokens_per_row
from vdcompress.modeling.decode_settings import MIXED_PROGRAMS, TABLE, settings_for
from vdcompress.modeling.decode_spans import spans_of
from vdcompress.modeling.decode_tiles import Section, Tile
from vdcompress.modeling.packed_cache import PackedLayer
from vdcompress.modeling.packing import pack
from vdcompress.modeling.schemes import SCHEMES

KNOWN = [(name, bits) for name, scheme in SCHEMES.items() for bits in scheme.bits]
EXACT = [(0, 0), (4, 0), (0, 20), (3, 37)]


def unit(packed: list[int], place: int, found: Tile) -> tuple[int, int]:
    """Return the two sources of 16 bits that a unit of a row offers."""
    if found.unit_bytes == 3:
        latent, column = divmod(place, found.units)
        low, middle, high = (
            packed[latent * 3 * found.units + plane * found.units + column] for plane in range(3)
        )
        return low | middle << 8, middle | high << 8
    start = place * found.unit_bytes
    return (int.from_bytes(bytes(packed[start : start + found.unit_bytes]), "little"),) * 2


@pytest.mark.parametrize(("form", "bits"), KNOWN)
@pytest.mark.parametrize(("width", "tokens"), [(8, 8), (14, 1), (40, 8), (72, 2), (192, 1)])
def test_every_code_is_read_once(form: str, bits: int, width: int, tokens: int) -> None:
    found = tile(form, bits, width, tokens=tokens, latents=1)
    codes = torch.randint(0, 2**bits, (tokens, width), dtype=torch.uint8)
    packed = pack(codes, bits).flatten().tolist()
    seen: dict[tuple[int, int], int] = {}
    for block, p, f in found.terms:
        piece, field = found.pieces[p], found.fields[f]
        assert field.position + bits <= MANTISSA
        for place in range(piece.offset, min(piece.offset + piece.size, found.units * tokens)):
            code = field.first + found.step * (place % found.units)
            if code < width and code // found.block == block:
                word = unit(packed, place, found)[field.source] >> field.shift
                value = (word & found.mask << field.position) >> field.position
                assert (place // found.units, code) not in seen
                seen[place // found.units, code] = value
    expected = {(t, w): int(codes[t, w]) for t in range(tokens) for w in range(width)}
    assert seen == expected


def test_pieces_waste_little() -> None:
    for tokens, width in ((8, 40), (1, 192), (2, 80), (2, 128), (8, 64)):
        for bits in (8, 4):
            found = tile("per_token", bits, width, tokens=tokens, latents=1)
            multiplied = sum(found.pieces[p].size for _, p, _ in found.terms)
            assert multiplied <= 1.6 * tokens * width
    assert [tokens_per_row(heads, 40, packed=True) for heads in (1, 2, 3, 4, 8, 32)] == [
        8,
        4,
        2,
        2,
        1,
        1,
    ]
    assert tokens_per_row(1, 320, packed=True) == 1
    assert [tokens_per_row(1, 64, packed=packed) for packed in (True, False)] == [4, 8]


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(("sinks", "window"), EXACT)
@pytest.mark.parametrize("tokens", [2, 110])
def test_spans_hold_what_the_newest_query_sees(
    name: str, sinks: int, window: int, tokens: int
) -> None:
    layout = LAYERS[name]
    key = drawn(2, layout.k_groups, tokens + 1, layout.k_head_dim, seed=1, dtype=torch.float16)
    value = drawn(2, layout.v_groups, tokens + 1, layout.v_head_dim, seed=2, dtype=torch.float16)
    cache = PackedLayer(layout, sinks, window)
    cache.update(key[:, :, :tokens], value[:, :, :tokens])
    keys, values = cache.update(key[:, :, tokens:], value[:, :, tokens:])
    spans = spans_of(keys, values)
    assert sum(span.tokens for span in spans) == tokens + 1
    found = sides(spans, 4)
    for side, latents in zip(found, (keys, values), strict=True):
        expected = latents.dequantize(0, tokens + 1).double()
        expected = expected.repeat_interleave(4 // expected.shape[1], dim=1)
        torch.testing.assert_close(side, expected, rtol=1e-3, atol=1e-4)


def test_spans_are_as_many_at_every_length() -> None:
    layout = LAYERS["one latent, blocks of 64"]
    counts = set()
    for tokens in (1, 50, 97):
        cache = PackedLayer(layout, 4, 16)
        shapes = ((layout.k_groups, layout.k_head_dim), (layout.v_groups, layout.v_head_dim))
        x = [drawn(1, g, tokens, w, seed=3, dtype=torch.float16) for g, w in shapes]
        cache.update(*x)
        counts.add(len(spans_of(*cache.stored())))
    assert counts == {4}


def test_without_triton_the_kernel_is_left_out(monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    for name in ("triton_decode", "decode_kernels"):
        monkeypatch.delitem(sys.modules, f"vdcompress.modeling.{name}", raising=False)
    x = torch.zeros(1, 1, 1, 8, dtype=torch.float16)
    assert attention._decoded(x, x, x, None, 1.0) is None


def test_an_exported_folder_carries_the_kernel_and_loads_without_triton() -> None:
    family = Path(attention.__file__).with_name("llama.py")
    files = {Path(file) for file in get_relative_import_files(family)}
    assert {"triton_decode.py", "decode_kernels.py"} <= {file.name for file in files}
    assert {name for file in files for name in get_imports(file)} & {
        "triton",
        "vdcompress",
    } == set()


@pytest.mark.parametrize("tokens", [1, 2, 4, 8])
@pytest.mark.parametrize("bits", [(16,), (8, 4), (8, 8), (4, 2), (5,), (2, 2)])
def test_every_layer_has_settings(bits: tuple[int, ...], tokens: int) -> None:
    most = min(each for each in (2, 3, 4, 8, 16) if each >= max(bits))
    row = 2 if (most, tokens) == (16, 4) else tokens
    found = settings_for(bits, tokens)
    assert replace(found, programs=0) == replace(TABLE[most, row], programs=0)
    mixed = len(set(bits)) > 1
    assert found.programs == (MIXED_PROGRAMS if mixed else TABLE[most, row].programs)


@pytest.mark.parametrize(("heads", "ahead", "words"), [(8, 0, 1), (4, 1, 0), (2, 0, 0), (1, 0, 0)])
def test_scales_that_triton_does_not_read_ahead(heads: int, ahead: bool, words: bool) -> None:
    """Four zero points, a byte each, are what it reads ahead by itself."""
    tokens = tokens_per_row(heads, 40, packed=True)
    parts = [tile("per_token", 4, 40, tokens=tokens, latents=1) for _ in range(2)]
    section = Section((parts[0],), parts[1], heads, tokens, 16, 40, 40)
    assert (section.scales_ahead, section.scales_in_words) == (ahead, words)
