"""The original model with a simulated quantised cache, against loops and arithmetic."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vdcompress.errors import ModelError, UsageError
from vdcompress.evaluate import evaluate
from vdcompress.plan import ModelShape
from vdcompress.quantized_reference import (
    INT4,
    INT8,
    QuantizedCache,
    evaluate_quantized,
    read_back,
)

PYTHIA = ModelShape("gpt_neox", 6, 512, 8, 8, 64, 16)
GROUPED = ModelShape("llama", 3, 256, 8, 2, 64, 64)


def looped(vector: list[float], bits: int) -> list[float]:
    """Round one vector, one number after another."""
    levels = 2**bits - 1
    zero = torch.tensor(min(vector)).half().item()
    scale = torch.tensor((max(vector) - zero) / levels, dtype=torch.float64).half().item()
    found = []
    for number in vector:
        code = round((number - zero) / scale) if scale else 0
        found.append(zero + scale * min(max(code, 0), levels))
    return found


def attention(query: Any, key: Any, value: Any, bits: tuple[int, int], scaling: float) -> Any:
    """Attend causally, [h, t, d] and [g, t, d], position by position."""
    heads, length, _ = query.shape
    share = heads // key.shape[0]
    output = torch.zeros(length, heads, value.shape[-1], dtype=torch.float64)
    for h in range(heads):
        for t in range(length):
            keys = [looped(key[h // share, s].tolist(), bits[0]) for s in range(t + 1)]
            values = [looped(value[h // share, s].tolist(), bits[1]) for s in range(t + 1)]
            query_now = query[h, t].tolist()
            scores = [scaling * sum(a * b for a, b in zip(query_now, k, strict=True)) for k in keys]
            most = max(scores)
            weights = [math.exp(score - most) for score in scores]
            for weight, read in zip(weights, values, strict=True):
                output[t, h] += weight / sum(weights) * torch.tensor(read, dtype=torch.float64)
    return output


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_rounding_is_that_of_a_loop(bits: int) -> None:
    x = torch.randn(5, 3, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[0, 0] = 0.25  # all alike
    x[0, 1] += 100
    found = read_back(x, bits)
    for vector, read in zip(x.flatten(0, 1), found.flatten(0, 1), strict=True):
        assert read.tolist() == pytest.approx(looped(vector.tolist(), bits), abs=1e-12)
    assert found[0, 0].tolist() == [0.25] * 16
    step = (x.amax(-1) - x.amin(-1)) / (2**bits - 1)
    assert bool(((found - x).abs().amax(-1) <= 0.52 * step + 0.07).all())


@pytest.mark.parametrize("bits", [(8, 8), (4, 4), (8, 4)])
def test_attention_is_that_of_a_loop(bits: tuple[int, int]) -> None:
    draw = torch.Generator().manual_seed(1)
    query = torch.randn(4, 6, 8, generator=draw, dtype=torch.float64)
    key, value = (torch.randn(2, 6, 8, generator=draw, dtype=torch.float64) for _ in range(2))
    module: Any = SimpleNamespace(is_causal=True, training=False, num_key_value_groups=2)
    output, _ = QuantizedCache(*bits)._attend(
        module, query[None], key[None], value[None], None, scaling=0.3, is_causal=True
    )
    naive = attention(query, key, value, bits, 0.3)
    torch.testing.assert_close(output[0], naive, rtol=1e-9, atol=1e-9)


def test_a_whole_model_rounds_what_it_caches(base: Any, token_windows: Any) -> None:
    """With the projections' outputs known, a layer's attention is the loop's."""
    model = base.model.double()
    seen: list[tuple[Any, ...]] = []

    class Listening(QuantizedCache):
        def _attend(self, module: Any, query: Any, key: Any, value: Any, mask: Any, **rest: Any):
            output = super()._attend(module, query, key, value, mask, **rest)
            seen.append((query, key, value, rest["scaling"], output[0]))
            return output

    ids = token_windows[:1, :7]
    try:
        with torch.inference_mode(), Listening(4, 4).applied(model):
            model(ids, use_cache=False)
    finally:
        model.float()
    assert len(seen) == base.shape.layers
    assert seen[0][1].shape[1] == base.shape.kv_heads
    for query, key, value, scaling, output in seen:
        naive = attention(query[0], key[0], value[0], (4, 4), scaling)
        torch.testing.assert_close(output[0], naive, rtol=1e-9, atol=1e-9)


def test_nothing_depends_on_how_the_text_is_cut(base: Any, token_windows: Any) -> None:
    ids = token_windows[:2, :12]
    with torch.inference_mode(), INT4.applied(base.model):
        whole = base.model(ids, use_cache=False).logits
        past, parts = None, []
        for step in ids.split(5, dim=1):
            out = base.model(step, past_key_values=past, use_cache=True)
            past, parts = out.past_key_values, [*parts, out.logits]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)


def test_eight_bits_cost_next_to_nothing_and_four_cost_more(base: Any, token_windows: Any) -> None:
    tokens = token_windows.flatten()[:513]
    plain = evaluate(base.model, tokens, window=64)
    int8, int4, int2 = (
        evaluate_quantized(base.model, tokens, QuantizedCache(bits, bits), window=64)
        for bits in (8, 4, 2)
    )
    assert int8.base_perplexity == plain.perplexity
    assert int8.kl is not None
    assert int4.kl is not None
    assert int2.kl is not None
    assert 0 < int8.kl < 1e-3
    assert 10 * int8.kl < int4.kl < int2.kl
    assert int8.perplexity != plain.perplexity


def test_one_side_may_have_fewer_bits(base: Any, token_windows: Any) -> None:
    tokens = token_windows.flatten()[:129]
    found = {
        bits: evaluate_quantized(base.model, tokens, QuantizedCache(*bits), window=64).kl
        for bits in ((8, 8), (8, 2), (2, 8), (2, 2))
    }
    assert len(set(found.values())) == 4
    assert min(found, key=lambda bits: found[bits] or 0) == (8, 8)


@pytest.mark.parametrize(
    ("shape", "cache", "expected"),
    [
        (PYTHIA, INT8, 6528),
        (PYTHIA, INT4, 3456),
        (PYTHIA, QuantizedCache(8, 4), 4992),
        (PYTHIA, QuantizedCache(3, 3), 2688),
        (GROUPED, INT8, 3 * 2 * 2 * (64 + 4)),
    ],
)
def test_scales_and_zero_points_are_counted(
    shape: ModelShape, cache: QuantizedCache, expected: int
) -> None:
    assert cache.bytes_per_token(shape) == expected


def test_the_model_attends_as_before_afterwards(base: Any, token_windows: Any) -> None:
    model, ids = base.model, token_windows[:1, :9]
    before = model.config._attn_implementation
    with torch.inference_mode():
        logits = model(ids).logits
        with pytest.raises(ZeroDivisionError):
            fail_within(model)
        assert model.config._attn_implementation == before
        assert torch.equal(model(ids).logits, logits)
    assert "vdcompress" not in str(model.config.to_dict())


def fail_within(model: Any) -> None:
    with INT4.applied(model):
        assert model.config._attn_implementation == "vdcompress_cache_int4"
        raise ZeroDivisionError


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_failed_measurement_leaves_the_model_as_it_was(
    base: Any, token_windows: Any, monkeypatch: pytest.MonkeyPatch, implementation: str
) -> None:
    model: Any = base.model
    before = model.config._attn_implementation
    model.config._attn_implementation = implementation
    monkeypatch.setattr(
        "vdcompress.quantized_reference.read_back", lambda x, _bits: torch.full_like(x, torch.nan)
    )
    try:
        with pytest.raises(ModelError, match="NaN"):
            evaluate_quantized(model, token_windows.flatten(), INT8, window=64)
        assert model.config._attn_implementation == implementation
        assert not model.training
    finally:
        model.config._attn_implementation = before


@pytest.mark.parametrize("bits", [0, 9, -1])
def test_unknown_bits_are_refused(bits: int) -> None:
    with pytest.raises(UsageError, match=f"{bits} bits"):
        QuantizedCache(8, bits)


def test_names() -> None:
    assert (INT8.name, INT4.name, QuantizedCache(8, 4).name) == ("int8", "int4", "k8-v4")
