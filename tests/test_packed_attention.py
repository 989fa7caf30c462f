"""Attention over packed latents beside a naive one in float64, whatever chunks they come in."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from naive_packed import LAYERS, layer, naive_attention
from vdcompress.modeling import numba_decode, packed_attention, packed_prompt
from vdcompress.modeling.attention import latent_attention, matmul_attention
from vdcompress.modeling.layout import LayerLayout, Part
from vdcompress.modeling.packed_cache import PackedLayer
from vdcompress.modeling.packed_latents import PackedLatents
from vdcompress.modeling.packed_prompt import is_prompt
from vdcompress.modeling.rounded_latents import rounded_layer

HEADS, TOKENS, SCALE = 4, 110, 0.3
EXACT = [(0, 0), (4, 0), (0, 20), (3, 37)]
every_layer = pytest.mark.parametrize("name", LAYERS)


class Attention(nn.Module):
    is_causal = True

    def __init__(self, layout: LayerLayout) -> None:
        super().__init__()
        self.num_key_value_groups = HEADS // max(layout.k_groups, layout.v_groups)
        self.eval()


def drawn(layout: Any, tokens: int = TOKENS, batch: int = 2, dtype: Any = torch.float32) -> Any:
    draw = torch.Generator().manual_seed(1)
    sides = ((HEADS, layout.k_head_dim), (layout.k_groups, layout.k_head_dim))
    shapes = (*sides, (layout.v_groups, layout.v_head_dim))
    return [torch.randn(batch, g, tokens, w, generator=draw).to(dtype) for g, w in shapes]


def through_cache(
    cache: PackedLayer, sides: list[Tensor], chunk: int, mask: Tensor | None = None
) -> Tensor:
    outputs, seen, module = [], 0, Attention(cache.layout)
    for query, key, value in zip(*(x.split(chunk, dim=2) for x in sides), strict=True):
        start, seen = seen, seen + query.shape[2]
        part = None if mask is None else mask[:, None, start:seen, :seen]
        keys, values = cache.update(key, value)
        output, _ = latent_attention(module, query, keys, values, part, scaling=SCALE)
        outputs.append(output.transpose(1, 2))
    return torch.cat(outputs, dim=2)


@every_layer
@pytest.mark.parametrize(("sinks", "window"), EXACT)
def test_it_is_the_naive_one_whatever_the_chunk(name: str, sinks: int, window: int) -> None:
    layout = LAYERS[name]
    sides = drawn(layout)
    expected = naive_attention(*sides, layout, scaling=SCALE, sinks=sinks, window=window)
    each = (1,) if (sinks, window) == EXACT[-1] else ()  # slow, and alike for all
    for chunk in (*each, 16, 64, TOKENS):
        found = through_cache(PackedLayer(layout, sinks, window), sides, chunk)
        torch.testing.assert_close(found.double(), expected, atol=2e-5, rtol=2e-5)


@every_layer
def test_half_precision(name: str) -> None:
    layout = LAYERS[name]
    sides = drawn(layout, dtype=torch.bfloat16)
    found = through_cache(PackedLayer(layout, 2, 5), sides, 50)
    assert found.dtype == torch.bfloat16
    expected = naive_attention(*sides, layout, scaling=SCALE, sinks=2, window=5)
    torch.testing.assert_close(found.double(), expected, atol=2e-2, rtol=2e-2)


def padded_mask(tokens: int) -> Tensor:
    """[2, tokens, tokens]: causal, the second sequence begins at token 9."""
    mask = torch.ones(2, tokens, tokens, dtype=torch.bool).tril()
    mask[1, :, :9] = False
    return mask


@every_layer
@pytest.mark.parametrize("additive", [False, True])
@pytest.mark.parametrize("chunk", [1, 64])
def test_masks(name: str, additive: bool, chunk: int) -> None:
    layout = LAYERS[name]
    sides, mask = drawn(layout), padded_mask(TOKENS)
    given = mask
    if additive:
        given = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    found = through_cache(PackedLayer(layout, 4, 10), sides, chunk, given)
    expected = naive_attention(*sides, layout, scaling=SCALE, sinks=4, window=10, mask=mask)
    seen = mask.any(-1)[:, None, :, None].expand(expected.shape)
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found.double()[seen], expected[seen], atol=2e-5, rtol=2e-5)


def test_a_prompt_with_the_largest_number_of_half_precision() -> None:
    layout = layer(Part(1, 8, 8, "per_token"), (1, 8, 8, "per_token"), None)
    sides = drawn(layout, tokens=64, batch=1, dtype=torch.float16)
    sides[2][:, :, 3, 0] = torch.finfo(torch.float16).max
    found = through_cache(PackedLayer(layout), sides, 64)
    assert found.isfinite().all()


@pytest.mark.parametrize("chunk", [1, 31, 64])
def test_minus_infinity_in_a_mask_hides_tokens(chunk: int) -> None:
    layout, mask = LAYERS["V exact"], padded_mask(64)
    sides = drawn(layout, tokens=64)
    given = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    found = through_cache(PackedLayer(layout, 4, 10), sides, chunk, given)
    expected = through_cache(PackedLayer(layout, 4, 10), sides, chunk, mask)
    torch.testing.assert_close(found[:, :, 9:], expected[:, :, 9:], atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_wide_mask_is_finite_in_half_precision(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """Not every kernel of torch makes a number of a query that sees nothing."""
    layout, mask = LAYERS["V exact"], padded_mask(64)
    given = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    added: list[Tensor] = []

    def attended(query: Tensor, _key: Tensor, value: Tensor, own: Tensor, _scaling: float) -> Any:
        added.append(own)
        return query.new_zeros(*query.shape[:3], value.shape[-1])

    monkeypatch.setattr(packed_prompt, "_attended", attended)
    through_cache(PackedLayer(layout, 4, 10), drawn(layout, tokens=64, dtype=dtype), 64, given)
    assert all(own.isfinite().all() and own.dtype == dtype for own in added)
    assert added


@every_layer
@pytest.mark.parametrize(("sinks", "window"), EXACT)
def test_without_a_cache_it_is_the_same(name: str, sinks: int, window: int) -> None:
    layout = LAYERS[name]
    query, key, value = drawn(layout)
    key.requires_grad_()
    value.requires_grad_()
    rounded = rounded_layer(key, value, layout, sinks, window)
    found, _ = latent_attention(Attention(layout), query, *rounded, None, scaling=SCALE)
    with torch.no_grad():
        packed = through_cache(PackedLayer(layout, sinks, window), [query, key, value], TOKENS)
    torch.testing.assert_close(found.transpose(1, 2), packed, atol=2e-5, rtol=2e-5)
    found.square().sum().backward()
    assert key.grad.abs().sum() > 0
    assert value.grad.abs().sum() > 0


@pytest.mark.parametrize("unpacked", [True, False])
def test_long_prompts_are_cut_into_queries_and_blocks(
    monkeypatch: pytest.MonkeyPatch, unpacked: bool
) -> None:
    layout = LAYERS["one latent, blocks of 64"]
    sides = drawn(layout, tokens=700, batch=1)
    monkeypatch.setattr(packed_attention, "is_prompt", lambda *_: False)
    expected = through_cache(PackedLayer(layout, 4, 40), sides, 50)
    monkeypatch.setattr(packed_attention, "is_prompt", lambda *_: unpacked)
    found = through_cache(PackedLayer(layout, 4, 40), sides, 700)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=2e-5)


def test_what_is_unpacked_at_once_is_of_the_size_of_the_prompt() -> None:
    layout = LAYERS["V exact"]
    cache = PackedLayer(layout)
    for new, prompt in ((31, False), (32, True), (100, True), (40, False), (32, False)):
        query, key, value = drawn(layout, tokens=new)
        keys, _ = cache.update(key, value)
        assert is_prompt(query, keys) is prompt


@pytest.mark.parametrize("side", ["key", "value"])
def test_other_attention_says_what_is_wrong(side: str) -> None:
    layout = LAYERS["V exact"]
    query, key, value = drawn(layout)
    packed = dict(zip(("key", "value"), PackedLayer(layout).update(key, value), strict=True))
    sides = {"key": key, "value": value, side: packed[side]}
    with pytest.raises((AttributeError, TypeError), match="only the attention implementation"):
        matmul_attention(Attention(layout), query, *sides.values(), None, scaling=SCALE)
    with pytest.raises((AttributeError, TypeError), match="only the attention implementation"):
        nn.functional.scaled_dot_product_attention(query, *sides.values())


def test_nothing_of_the_size_of_the_cache_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most bytes that are alive beside the cache do not grow with it, where torch reads it."""
    monkeypatch.setattr(numba_decode, "WORTH_PACKED", math.inf)
    layout = LAYERS["one latent, blocks of 64"]
    peaks = []
    for tokens in (4096, 16384):
        query, key, value = drawn(layout, tokens=tokens, batch=1)
        cache = PackedLayer(layout, 4, 10)
        with torch.no_grad():
            cache.update(key, value)
            one = [x[:, :, :1] for x in (query, key, value)]
            keys, values = cache.update(*one[1:])
            assert isinstance(keys, PackedLatents)
            with torch.profiler.profile(profile_memory=True) as profile:
                latent_attention(Attention(layout), one[0], keys, values, None, scaling=SCALE)
        alive = peak = 0
        for event in sorted(profile.events(), key=lambda event: event.time_range.start):
            if event.name == "[memory]":
                alive += event.self_cpu_memory_usage
                peak = max(peak, alive)
        peaks.append(peak)
    unpacked = 4 * 16384 * (layout.k_dim + layout.v_dim)
    assert 0 < peaks[1] < 1.2 * peaks[0]
    assert peaks[1] < unpacked / 4
