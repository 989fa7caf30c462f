"""The decode kernel beside a naive one in float64: on CUDA, or else in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

CUDA = torch.cuda.is_available()
pytest.importorskip("triton", minversion=None if CUDA else "3.9", reason="needs Triton")

from decode_reference import (  # noqa: E402
    FORMS,
    GROUPED,
    MASKS,
    MIXED,
    Side,
    attended,
    case,
    drawn,
    error,
    mask_for,
    stored,
)
from naive_packed import LAYERS, naive_attention  # noqa: E402
from vdcompress.modeling import triton_decode  # noqa: E402
from vdcompress.modeling.attention import _decoded  # noqa: E402
from vdcompress.modeling.decode_sections import (  # noqa: E402
    Query,
    form_of,
    sections_for,
    table_settings,
)
from vdcompress.modeling.decode_settings import BY_CHANNEL, Settings  # noqa: E402
from vdcompress.modeling.decode_spans import PartTokens, Span  # noqa: E402
from vdcompress.modeling.packed_cache import PackedLayer  # noqa: E402
from vdcompress.modeling.triton_decode import attend_exact, attend_packed, decode  # noqa: E402

slowly = pytest.mark.usefixtures() if CUDA else pytest.mark.slow  # in the interpreter
DEVICE = "cuda" if CUDA else "cpu"
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 8e-3}
SCALE = 0.3


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """Let what nothing was written to be NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def moved(part: PartTokens) -> PartTokens:
    tensors = (None if x is None else x.to(DEVICE) for x in part[:3])
    return PartTokens(*tensors, *part[3:])


def check(query: Tensor, spans: list[Span], mask: Tensor | None = None, **settings: Any) -> Tensor:
    there = [
        Span(span.start, span.tokens, tuple(map(moved, span.keys)), moved(span.values))
        for span in spans
    ]
    given = Settings(**settings) if settings else None
    on_device = None if mask is None else mask.to(DEVICE)
    found = decode(query.to(DEVICE), there, on_device, SCALE, settings=given)
    assert found.dtype == query.dtype
    expected = attended(query, spans, mask, SCALE)
    assert error(found, expected) < TOLERANCE[query.dtype]
    return found.cpu()


@pytest.mark.parametrize(("form", "bits"), FORMS)
def test_every_form_with_a_latent_for_each_head(form: str, bits: int) -> None:
    tokens = 96 if form == "per_channel" else 117
    query, spans = case([(2, 40, form, bits)], (2, 24, form, bits), tokens, 2, torch.float16)
    check(query, spans)


@slowly
@pytest.mark.parametrize(("form", "bits"), FORMS)
def test_every_form_with_one_latent_in_several_blocks(form: str, bits: int) -> None:
    query, spans = case([(1, 72, form, bits)], (1, 136, form, bits), 64, 8, torch.bfloat16)
    check(query, spans)


def test_scales_that_begin_anywhere_in_a_word() -> None:
    """The second sequence's do neither at a multiple of 4 bytes nor of 2."""
    query, spans = case([(1, 168, "per_token", 4)], (1, 168, "per_token", 8), 61, 8, torch.float16)
    for part in spans[0].parts:
        assert part.scale is not None
        assert part.zero is not None
        assert (part.scale.stride(0) * 2 % 4, part.zero.stride(0) % 2) == (2, 1)
    check(query, spans)


def test_keys_by_channel_have_their_own_cut() -> None:
    for form, own in (("per_channel", True), ("per_token", False)):
        _, spans = case([(1, 64, form, 4)], (1, 64, "per_token", 4), 64, 8, torch.float16)
        assert (table_settings(spans, 8) == BY_CHANNEL) is own


@pytest.mark.parametrize(("programs", "own"), [(2, False), (9, True)])
def test_short_spans_have_programs_where_there_are_many(programs: int, own: bool) -> None:
    part, spans = (1, 40, "exact", 16), []
    for start, stop in ((0, 4), (4, 9004), (9004, 9104)):
        _, found = case([part], part, stop - start, 1, torch.float16)
        spans.append(found[0]._replace(start=start))
    forms = tuple(map(form_of, spans))
    tiles, _ = sections_for(forms, Query(1, 1, 40, 40), Settings())
    settings = Settings(programs=programs)
    device = torch.device("cpu")
    pairs = triton_decode.multiprocessors(device)
    cut = triton_decode.Cut(tiles, settings, pairs, device)
    counts, most, slots = cut.of(spans)
    assert most <= cut.programs
    assert slots <= cut.slots
    taken = []
    for (tokens, _, first, _, blocks, *_), tile in zip(counts, tiles, strict=True):
        needed = -(-tokens // (blocks * tile.block))
        taken.append(set(range(first, first + needed)))
    assert set().union(*taken) == set(range(most))
    assert (len(taken[1]), most) == ((7, 9) if own else (2, 2))
    assert slots == sum(len(each) * tile.tokens for each, tile in zip(taken, tiles, strict=True))


@pytest.mark.parametrize(
    ("codes", "scales", "whole"), [(64, 64, True), (61, 64, False), (64, 61, False)]
)
def test_rows_are_read_whole_where_there_is_memory(codes: int, scales: int, whole: bool) -> None:
    parts = [
        PartTokens(
            torch.zeros(2, 1, codes, 20, dtype=torch.uint8)[:, :, :61],
            torch.zeros(2, 1, scales, 1, dtype=torch.float16)[:, :, :61],
            torch.zeros(2, 1, scales, 1, dtype=torch.uint8)[:, :, :61],
            "per_token",
            4,
            40,
        )
        for _ in range(2)
    ]
    assert all(form.whole is whole for form in form_of(Span(0, 61, (parts[0],), parts[1])))


def test_what_is_counted_looks_alike_to_triton_at_every_step() -> None:
    found = triton_decode.as_odd((0, 1, 16, 4095, 4096, 2**29))
    assert all(number % 2 and number > 1 for number in found)
    assert [(number - 3) >> 1 for number in found] == [0, 1, 16, 4095, 4096, 2**29]


def test_joining_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    for numbers in ("FEW_NUMBERS", "JOINED_NUMBERS"):
        monkeypatch.setattr(triton_decode, numbers, 64)  # 16 of 40 dimensions, of 4 slots
    key, value = (2, 40, "per_token", 4), (2, 40, "per_token", 4)
    query, spans = case([key], value, 600, 2, torch.float16)
    check(query, spans, programs=400)


@slowly
@pytest.mark.parametrize(("heads", "groups"), GROUPED)
def test_grouped_queries(heads: int, groups: int) -> None:
    key, value = (groups, 40, "per_token", 4), (groups, 80, "per_token", 8)
    query, spans = case([key], value, 90, heads, torch.float16)
    check(query, spans)


@slowly
@pytest.mark.parametrize(("keys", "value"), MIXED)
def test_parts_with_their_own_bits_and_groups(keys: Side, value: Any) -> None:
    query, spans = case(keys, value, 64, 8, torch.float16)
    check(query, spans)


@pytest.mark.parametrize("kind", MASKS)
def test_masks(kind: str) -> None:
    key, value = (2, 40, "per_token", 4), (2, 40, "per_token", 4)
    query, spans = case([key], value, 90, 4, torch.float16)
    check(query, spans, mask_for(kind, 90, torch.float16))


def test_nothing_to_attend_to_is_zero() -> None:
    query, spans = case([(1, 40, "exact", 16)], (1, 40, "exact", 16), 40, 2, torch.float16)
    keys = (moved(spans[0].keys[0]),)
    there = [Span(0, 40, keys, moved(spans[0].values))]
    mask = torch.zeros(2, 1, 1, 40, dtype=torch.bool, device=DEVICE)
    mask[1] = True
    found = decode(query.to(DEVICE), there, mask, SCALE)
    assert not found[0].any()
    assert found[1].isfinite().all()


@slowly
@pytest.mark.parametrize("settings", [(16, 1, 2, 1), (16, 1, 3, 400), (32, 2, 2, 8), (64, 4, 2, 8)])
def test_the_result_does_not_depend_on_how_work_is_cut(settings: tuple[int, ...]) -> None:
    names = ("rows", "warps", "stages", "programs")
    for groups in (1, 2):
        key, value = (groups, 40, "per_token", 4), (groups, 24, "normal", 4)
        query, spans = case([key], value, 600, 2, torch.float16)
        check(query, spans, **dict(zip(names, settings, strict=True)))


def test_small_values_beside_a_large_sink() -> None:
    """Weights far below the largest one, times scales far below 1, must not vanish."""
    query = torch.zeros(1, 1, 1, 40, dtype=torch.float16)
    query[..., 0] = 10
    key, value = (drawn(1, 1, 700, 40, seed=s, dtype=torch.float16) for s in (1, 2))
    key[..., 0] = 0
    key[:, :, 0, 0] = 10 / (10 * SCALE)
    value = value * 1e-3
    value[:, :, 0] = 0
    parts = [stored(x, "per_token", 4) for x in (key, value)]
    check(query, [Span(0, 700, (parts[0],), parts[1])])


@slowly
@pytest.mark.parametrize(
    ("name", "sinks", "window"), [*((name, 4, 20) for name in LAYERS), (next(iter(LAYERS)), 0, 0)]
)
def test_a_packed_cache(name: str, sinks: int, window: int) -> None:
    layout, tokens = LAYERS[name], 110
    shapes = ((4, layout.k_head_dim), (layout.k_groups, layout.k_head_dim))
    shapes = (*shapes, (layout.v_groups, layout.v_head_dim))
    sides = [drawn(2, g, tokens, w, seed=5, dtype=torch.float16) for g, w in shapes]
    expected = naive_attention(*sides, layout, scaling=SCALE, sinks=sinks, window=window)
    cache = PackedLayer(layout, sinks, window)
    for stop, new in ((1, 1), (107, 106), (108, 1), (110, 2)):
        query, key, value = (x[:, :, stop - new : stop].to(DEVICE) for x in sides)
        latents = cache.update(key, value)
        found = attend_packed(query[:, :, -1:], *latents, None, SCALE)
        assert error(found, expected[:, :, stop - 1 : stop]) < 3e-3


def test_what_it_does_not_know_is_left_to_others() -> None:
    x = torch.zeros(1, 4, 3, 40, device=DEVICE)
    half, one = x.half(), x[:, :, :1].half()
    assert attend_exact(x[:, :, :1], x, x, None, SCALE) is None
    assert attend_exact(half, half, half, None, SCALE) is None
    assert attend_exact(one, half.bfloat16(), half, None, SCALE) is None
    assert attend_exact(one, half, half, None, SCALE) is not None
    assert _decoded(one, half, half, None, SCALE) is None  # so few bytes are not worth a launch


@pytest.mark.skipif(not CUDA, reason="needs CUDA")
def test_a_graph_replays_it() -> None:
    query, spans = case([(8, 40, "per_token", 4)], (8, 40, "per_token", 4), 700, 8, torch.float16)
    there = [Span(0, 700, tuple(map(moved, spans[0].keys)), moved(spans[0].values))]
    given = query.to(DEVICE)
    decode(given, there, None, SCALE)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = decode(given, there, None, SCALE)
    given.mul_(-0.5)
    graph.replay()
    assert error(found, attended(query * -0.5, spans, None, SCALE)) < 2e-3


@pytest.mark.skipif(not CUDA, reason="needs CUDA")
def test_kernels_launched_early_wait_for_what_they_read() -> None:
    query, spans = case([(8, 40, "per_token", 4)], (8, 40, "per_token", 4), 700, 8, torch.float16)
    there = [Span(0, 700, tuple(map(moved, spans[0].keys)), moved(spans[0].values))]
    given = one_by_one = query.to(DEVICE)
    for _ in range(64):
        one_by_one = decode(one_by_one, there, None, SCALE)
        torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chained = given
        for _ in range(64):
            chained = decode(chained, there, None, SCALE)
    graph.replay()
    assert torch.equal(chained, one_by_one)
