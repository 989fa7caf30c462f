"""Queries that meet latents in a processor's tiles, beside float64 and beside those that do not."""

from __future__ import annotations

import ctypes
import mmap
from typing import Any

import numba
import numpy as np
import pytest
import torch
from torch import Tensor

from decode_reference import attended, case, drawn, error, mask_for, stored
from vdcompress.modeling import numba_decode, numba_tiles
from vdcompress.modeling.decode_spans import Span
from vdcompress.modeling.numba_decode import decode
from vdcompress.modeling.numba_tile_products import (
    add_by_tiles,
    dots_by_tiles,
    lay_out,
    tiles_of,
)
from vdcompress.modeling.numba_tiles import (
    PAIRS,
    allowed,
    enter_tiles,
    leave_tiles,
)

SCALE = 0.3
ROOMS = (528, 1040, 2064, 3088, 6160)  # words that products ask memory for, or nearly
with_tiles = pytest.mark.skipif(not allowed(), reason="needs a processor with tiles (AMX)")


@numba.njit
def _leave_nan(words):  # type: ignore[no-untyped-def]
    """Let memory that is asked for next hold NaN."""
    kept = [np.full(count, 0xFFFFFFFF, np.uint32) for count in words for _ in range(3)]
    return len(kept)


@numba.njit
def _both(query, tiles, x, block, out, sums, weights, begin):  # type: ignore[no-untyped-def]
    lay_out(query.reshape(query.size), query.shape[1], tiles)
    enter_tiles(query.shape[1] % PAIRS)
    _leave_nan(ROOMS)
    dots_by_tiles(tiles, query.shape[0], x, (0, 0), block, out)
    _leave_nan(ROOMS)
    add_by_tiles(sums, weights, begin, x, (0, 0), block)
    leave_tiles()


@with_tiles
@pytest.mark.parametrize(
    ("rows", "tokens", "blocks", "size"),
    [
        (8, 320, 1, 192),
        (8, 333, 1, 192),
        (4, 77, 3, 64),
        (12, 50, 2, 40),
        (1, 1, 1, 2),
        (5, 66, 1, 34),
    ],
)
def test_products_are_those_of_float64(rows: int, tokens: int, blocks: int, size: int) -> None:
    draw = np.random.default_rng(tokens)
    stored_numbers = torch.from_numpy(draw.standard_normal((tokens, blocks, size))).bfloat16()
    exact = stored_numbers.double().numpy()
    x = stored_numbers.view(torch.uint16).numpy()
    query = draw.standard_normal((blocks, rows, size)).astype(np.float32)
    weights = draw.random((rows, tokens + 3)).astype(np.float32)
    sums = np.ones((rows, blocks, size), np.float32)
    for block in range(blocks):
        out = np.full((rows, tokens), np.nan, np.float32)
        _both(
            query[block], np.empty(tiles_of(rows, size), np.uint16), x, block, out, sums, weights, 3
        )
        wanted = query[block].astype(np.float64) @ exact[:, block].T
        np.testing.assert_allclose(out, wanted, atol=3e-5 * np.abs(wanted).max())
    wanted = 1 + np.einsum("rt,tbd->rbd", weights[:, 3:].astype(np.float64), exact)
    np.testing.assert_allclose(sums, wanted, atol=3e-5 * np.abs(wanted).max())


@with_tiles
def test_nothing_behind_the_last_token_is_read() -> None:
    rows, tokens, size = 8, 21, 40
    page = mmap.mmap(-1, 2 * mmap.PAGESIZE)
    own = np.frombuffer(page, np.uint16)
    end = ctypes.c_void_p(own.ctypes.data + mmap.PAGESIZE)
    assert ctypes.CDLL(None).mprotect(end, mmap.PAGESIZE, 0) == 0  # who reads on ends the process
    x = own[mmap.PAGESIZE // 2 - tokens * size :][: tokens * size].reshape(tokens, 1, size)
    x[:] = torch.ones(1).bfloat16().view(torch.uint16).item()
    out, sums = np.zeros((rows, tokens), np.float32), np.zeros((rows, 1, size), np.float32)
    query, weights = np.ones((rows, size), np.float32), np.ones((rows, tokens), np.float32)
    _both(query, np.empty(tiles_of(rows, size), np.uint16), x, 0, out, sums, weights, 0)
    assert (out == size).all()
    assert (sums == tokens).all()


def check(query: Tensor, spans: list[Span], mask: Tensor | None = None) -> None:
    """Compare with float64, and with what is read without tiles, which is closer."""
    found = decode(query, spans, mask, SCALE)
    assert error(found, attended(query, spans, mask, SCALE)) < 8e-3
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(numba_decode, "allowed", lambda: False)
        other = decode(query, spans, mask, SCALE)
    assert error(found, other.double()) < 4e-3  # as bfloat16 numbers they may be rounded apart


FORMS = [("exact", 16), ("per_token", 8), ("per_token", 4)]


@with_tiles
@pytest.mark.parametrize(("form", "bits"), FORMS)
@pytest.mark.parametrize(("heads", "groups"), [(4, 1), (8, 1), (12, 1), (10, 2)])
@pytest.mark.parametrize("width", [192, 40, 34])
def test_forms_and_groups(form: str, bits: int, heads: int, groups: int, width: int) -> None:
    side = (groups, width, form, bits)
    query, spans = case([side], side, 459, heads, torch.bfloat16)
    check(query, spans)


@with_tiles
def test_parts_in_tiles_beside_others() -> None:
    keys: Any = [(1, 64, "per_token", 8), (2, 40, "per_token", 4), (1, 24, "normal", 3)]
    query, spans = case(keys, (1, 96, "normal", 2), 333, 8, torch.bfloat16)
    check(query, spans)
    query, spans = case(keys, (2, 96, "exact", 16), 333, 8, torch.bfloat16)
    check(query, spans)


@with_tiles
@pytest.mark.parametrize("kind", ["left padding", "of each head", "added"])
def test_masks(kind: str) -> None:
    side = (1, 64, "exact", 16)
    query, spans = case([side], side, 200, 4, torch.bfloat16)
    check(query, spans, mask_for(kind, 200, torch.bfloat16))


@with_tiles
@pytest.mark.parametrize("side", ["keys", "values"])
def test_what_is_no_number_stays_none(side: str) -> None:
    part = (1, 64, "exact", 16)
    query, spans = case([part], part, 200, 8, torch.bfloat16)
    broken = spans[0].keys[0] if side == "keys" else spans[0].values
    broken.codes[1, 0, 77, 5] = torch.nan
    found = decode(query, spans, None, SCALE)
    assert found[0].isfinite().all()
    assert not found[1].isfinite().all()


@with_tiles
def test_they_are_used_for_queries_that_they_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(numba_decode, "allowed", lambda: not asked.append(1))
    part = stored(drawn(1, 1, 64, 64, seed=1, dtype=torch.bfloat16), "exact", 16)
    for dtype, times in ((torch.float32, 0), (torch.bfloat16, 1), (torch.float16, 2)):
        decode(torch.ones(1, 8, 1, 64, dtype=dtype), [Span(0, 64, (part,), part)], None, SCALE)
        assert len(asked) == times


def test_a_process_that_may_not_use_them_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numba_tiles, "KNOWN", True)
    monkeypatch.setattr(torch.cpu, "_init_amx", lambda: True, raising=False)
    assert numba_tiles.allowed.__wrapped__()
    monkeypatch.setattr(torch.cpu, "_init_amx", lambda: False)
    assert not numba_tiles.allowed.__wrapped__()
    monkeypatch.delattr(torch.cpu, "_init_amx")
    assert not numba_tiles.allowed.__wrapped__()
