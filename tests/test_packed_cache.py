"""What a packed cache holds: exactly the planned bytes, and the same after all that beams do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from naive_packed import LAYERS, side_as_seen
from vdcompress.modeling.packed_cache import ROLLBACK, PackedLayer
from vdcompress.modeling.room import BLOCK, GROWTH
from vdcompress.plan import ModelShape, Plan

EXACT = [(0, 0), (4, 0), (0, 20), (3, 37)]
every_layer = pytest.mark.parametrize("name", LAYERS)
exact_tokens = pytest.mark.parametrize(("sinks", "window"), EXACT)


def plan_of(name: str, sinks: int, window: int) -> Plan:
    shape = ModelShape("gpt_neox", 1, 64, 4, 4, 40, 16)
    return Plan(shape, (LAYERS[name],), sinks=sinks, window=window)


def drawn(name: str, tokens: int, batch: int = 2, dtype: Any = torch.float32) -> list[Tensor]:
    layout, draw = LAYERS[name], torch.Generator().manual_seed(tokens)
    shapes = ((layout.k_groups, layout.k_head_dim), (layout.v_groups, layout.v_head_dim))
    return [torch.randn(batch, g, tokens, w, generator=draw).to(dtype) for g, w in shapes]


def filled(name: str, sides: list[Tensor], chunk: int, sinks: int, window: int) -> PackedLayer:
    cache = PackedLayer(LAYERS[name], sinks, window)
    for new in zip(*(side.split(chunk, dim=2) for side in sides), strict=True):
        cache.update(*new)
    return cache


def held(cache: PackedLayer) -> list[Tensor]:
    """Return both sides as the newest query reads them."""
    keys, values = cache.stored()
    return [side.dequantize(0, side.tokens) for side in (keys, values)]


def expected(name: str, sides: list[Tensor], sinks: int, window: int) -> list[Tensor]:
    layout = LAYERS[name]
    keys = [part for part in (layout.k_rotary, layout.k_nope) if part.width]
    return [
        side_as_seen(side, parts, side.shape[2], sinks, window).float()
        for side, parts in zip(sides, (keys, [layout.v]), strict=True)
    ]


def check(cache: PackedLayer, wanted: list[Tensor]) -> None:
    for found, side in zip(held(cache), wanted, strict=True):
        torch.testing.assert_close(found, side, atol=1e-6, rtol=1e-6)


@every_layer
@exact_tokens
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_are_those_of_the_plan(name: str, sinks: int, window: int, dtype: Any) -> None:
    plan, word = plan_of(name, sinks, window), str(dtype).removeprefix("torch.")
    for batch, chunk in ((1, 1), (3, 7), (2, 64)):
        cache, seen = PackedLayer(LAYERS[name], sinks, window), 0
        sides = drawn(name, 131, batch, dtype)
        for new in zip(*(side.split(chunk, dim=2) for side in sides), strict=True):
            cache.update(*new)
            seen += new[0].shape[2]
            assert cache.nbytes() == batch * plan.cache_bytes(seen, word)
    late = 2 * (window + 31 + ROLLBACK) + sinks
    spare = batch * dtype.itemsize * late * (plan.layers[0].k_dim + plan.layers[0].v_dim)
    block = batch * plan.cache_bytes(BLOCK, word)
    assert cache.nbytes_allocated() <= GROWTH * cache.nbytes() + block + spare


@every_layer
@exact_tokens
def test_what_is_held_does_not_depend_on_the_chunks(name: str, sinks: int, window: int) -> None:
    sides = drawn(name, 131)
    wanted = expected(name, sides, sinks, window)
    for chunk in (1, 16, 64, 131):
        check(filled(name, sides, chunk, sinks, window), wanted)


@every_layer
@exact_tokens
@pytest.mark.parametrize("removed", [1, 9, ROLLBACK])
def test_tokens_taken_back_leave_no_trace(name: str, sinks: int, window: int, removed: int) -> None:
    for tokens in (40, 131):
        sides = drawn(name, tokens)
        for chunk in (5, tokens):
            cache = filled(name, sides, chunk, sinks, window)
            cache.crop(-removed)
            left = tokens - removed
            assert cache.get_seq_length() == left
            kept = [side[:, :, :left] for side in sides]
            check(cache, expected(name, kept, sinks, window))
            assert cache.nbytes() == 2 * plan_of(name, sinks, window).cache_bytes(left, "float32")
            cache.update(*(side[:, :, left:] for side in sides))
            check(cache, expected(name, sides, sinks, window))


@every_layer
@exact_tokens
@pytest.mark.parametrize("left", [0, 2, 33, 70])
def test_many_tokens_taken_back_stay_what_they_became(
    name: str, sinks: int, window: int, left: int
) -> None:
    sides = drawn(name, 131)
    cache = filled(name, sides, 131, sinks, window)
    cache.crop(left - 131)
    assert cache.nbytes() == 2 * plan_of(name, sinks, window).cache_bytes(left, "float32")
    cache.update(*(side[:, :, left:] for side in sides))
    assert cache.nbytes() == 2 * plan_of(name, sinks, window).cache_bytes(131, "float32")
    for found, side, bound in zip(held(cache), sides, (4.0, 4.0), strict=True):
        assert (found - side).abs().max() < bound  # rounded twice at most, never another token
        same = torch.cosine_similarity(found.flatten(2), side.flatten(2), dim=-1)
        assert same.min() > 0.8


CHANGES: dict[str, tuple[Callable[[PackedLayer], None], Callable[[Tensor], Tensor]]] = {
    "reorder": (
        lambda cache: cache.reorder_cache(torch.tensor([1, 1])),
        lambda side: side[[1, 1]],
    ),
    "repeat": (
        lambda cache: cache.batch_repeat_interleave(3),
        lambda side: side.repeat_interleave(3, dim=0),
    ),
    "select": (
        lambda cache: cache.batch_select_indices(torch.tensor([1])),
        lambda side: side[[1]],
    ),
    "offload": (lambda cache: (cache.offload(), cache.prefetch())[0], lambda side: side),
}


@every_layer
@exact_tokens
@pytest.mark.parametrize("change", CHANGES)
def test_sequences_change_places(name: str, sinks: int, window: int, change: str) -> None:
    act, same = CHANGES[change]
    sides = drawn(name, 131)
    cache = filled(name, [side[:, :, :90] for side in sides], 90, sinks, window)
    act(cache)
    cache.update(*(same(side)[:, :, 90:] for side in sides))
    check(cache, [same(side) for side in expected(name, sides, sinks, window)])


def test_reset_forgets_everything() -> None:
    cache = filled("V exact", drawn("V exact", 50), 50, 2, 5)
    cache.reset()
    assert (cache.get_seq_length(), cache.nbytes(), cache.nbytes_allocated()) == (0, 0, 0)
    sides = drawn("V exact", 60, batch=1)
    cache.update(*sides)
    check(cache, expected("V exact", sides, 2, 5))


def test_gradients_are_refused() -> None:
    key, value = drawn("V exact", 4)
    with pytest.raises(RuntimeError, match="this cache is for inference"):
        PackedLayer(LAYERS["V exact"]).update(key.requires_grad_(), value)
