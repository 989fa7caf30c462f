"""From a plan to tokens: keys and shared latents of both families, whole and narrow."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vdcompress import initializers
from vdcompress.artifact import Compressed
from vdcompress.cost import with_maps
from vdcompress.export import export
from vdcompress.gains import gains
from vdcompress.load import Base
from vdcompress.modeling.cache import LatentCache
from vdcompress.pipeline.rewriting import compressed_model
from vdcompress.plan import ModelShape, Plan, Start, make_plan, plan_for
from vdcompress.request import Request
from vdcompress.rewrite import rewrite
from vdcompress.statistics import Statistics

CLOSE = {"atol": 1e-4, "rtol": 1e-4}


def whole(shape: ModelShape, v_groups: int, k_groups: int, start: Start | None = None) -> Plan:
    """Keep everything in so many latents."""
    partial = shape.rotary_dim < shape.head_dim
    return make_plan(
        shape,
        v_dim=shape.kv_dim,
        v_groups=v_groups,
        k_dim=shape.kv_dim,
        k_groups=k_groups,
        k_rotary_dim=shape.kv_heads * shape.rotary_dim if partial else None,
        start=start,
    )


def counts(base: Base) -> list[int]:
    """Return every number of latents."""
    return [n for n in range(1, base.shape.kv_heads + 1) if base.shape.kv_heads % n == 0]


def logits(model: Any, ids: Tensor, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        return model(ids, **kwargs).logits


def in_chunks(model: Any, ids: Tensor, sizes: list[int]) -> tuple[Tensor, LatentCache]:
    cache = LatentCache(model.config.num_hidden_layers)
    parts = [logits(model, part, past_key_values=cache) for part in ids.split(sizes, dim=1)]
    return torch.cat(parts, dim=1), cache


# Full width.


def test_full_width_is_the_base(base: Base, statistics: Statistics, token_windows: Tensor) -> None:
    expected = logits(base.model, token_windows[:2])
    every = itertools.product(counts(base), counts(base), ("folded", "per_head"))
    for v_groups, k_groups, maps in every:
        groups = f"V in {v_groups}, K in {k_groups}, {maps}"
        plan = whole(base.shape, v_groups, k_groups)
        plan = replace(plan, layers=tuple(with_maps(layer, maps) for layer in plan.layers))
        model = compressed_model(base, plan, statistics, token_windows, lambda _event: None)
        difference = logits(model, token_windows[:2]) - expected
        assert difference.abs().max() < 1e-4, groups
        cached, cache = in_chunks(model, token_windows[:2], [50, 1, 1, 12])
        assert (cached - expected).abs().max() < 1e-4, groups
        assert cache.nbytes() == 2 * plan.cache_bytes(64, "float32")
        assert plan.reduction == 0


@pytest.mark.parametrize("name", initializers.available())
def test_full_width_is_the_base_from_every_start(
    base: Base, statistics: Statistics, token_windows: Tensor, name: str
) -> None:
    expected = logits(base.model, token_windows[:2])
    for groups in counts(base):
        start = Start(name, "local", 2)
        model = rewrite(base, whole(base.shape, groups, groups, start), statistics)
        assert (logits(model, token_windows[:2]) - expected).abs().max() < 1e-4, groups


def test_full_width_pads_left(base: Base, statistics: Statistics, token_windows: Tensor) -> None:
    for groups in counts(base):
        model = rewrite(base, whole(base.shape, groups, groups), statistics)
        padded_equals_single(model, base.model, token_windows)


def padded_equals_single(model: Any, alone: Any, ids: Tensor) -> None:
    """Compare a batch padded on the left with the same sequences one by one in another model."""
    sequences = [ids[0, :20], ids[1, :13], ids[2, :1]]
    batch = torch.zeros(3, 20, dtype=torch.long)
    mask = torch.zeros(3, 20, dtype=torch.long)
    for row, sequence in enumerate(sequences):
        batch[row, 20 - len(sequence) :] = sequence
        mask[row, 20 - len(sequence) :] = 1
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    found = logits(model, batch, attention_mask=mask, position_ids=positions)
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    written = model.generate(batch, attention_mask=mask, **settings)
    for row, sequence in enumerate(sequences):
        expected = logits(alone, sequence[None])[0]
        torch.testing.assert_close(found[row, 20 - len(sequence) :], expected, **CLOSE)
        single = alone.generate(sequence[None], use_cache=False, **settings)
        assert written[row, 20:].tolist() == single[0, len(sequence) :].tolist()


# Narrow: equal widths, unequal ones, other groups on each side, layers that differ.


def equal(shape: ModelShape, _gains: Any) -> Plan:
    rotary = {} if shape.rotary_dim == shape.head_dim else {"k_rotary_dim": 8}
    return make_plan(shape, v_dim=16, k_dim=16, groups=1, **rotary)


def unequal(shape: ModelShape, gains: Any) -> Plan:
    return plan_for(shape, Request(v_dim=24, v_groups=1, k_dim=16, k_groups=2), gains=gains)


def own(shape: ModelShape, _gains: Any) -> Plan:
    return make_plan(shape, v_dim=8 * shape.kv_heads, k_dim=8 * shape.kv_heads)


def budget(shape: ModelShape, gains: Any) -> Plan:
    return plan_for(shape, Request(kv_budget=0.5, allocation="layers"), gains=gains)


def mixed(shape: ModelShape, gains: Any) -> Plan:
    """The first layer shared and narrow, the second as it was."""
    plan = unequal(shape, gains)
    return replace(plan, layers=(plan.layers[0], shape.full_layout()))


def per_head(shape: ModelShape, gains: Any) -> Plan:
    """The same latents, each head's maps on their own."""
    plan = equal(shape, gains)
    return replace(plan, layers=tuple(with_maps(layer, "per_head") for layer in plan.layers))


PLANS = (equal, unequal, own, budget, mixed, per_head)
EVERY = pytest.mark.parametrize("make", PLANS, ids=lambda make: make.__name__)
Make = Callable[[ModelShape, Any], Plan]


@pytest.fixture(scope="module")
def compressed(base: Base, statistics: Statistics, token_windows: Tensor) -> Callable[..., Any]:
    """Return a function that plans, rewrites and repairs once for all tests."""
    measured = gains(base.shape, statistics)
    done: dict[Make, tuple[Plan, Any]] = {}

    def compress(make: Make) -> tuple[Plan, Any]:
        if make not in done:
            plan = make(base.shape, measured)
            plan.validate()
            model = compressed_model(base, plan, statistics, token_windows, lambda _event: None)
            done[make] = plan, model
        return done[make]

    return compress


@EVERY
def test_cached_decode_equals_uncached(
    base: Base, compressed: Any, token_windows: Tensor, make: Make
) -> None:
    plan, model = compressed(make)
    ids = token_windows[:2, :40]
    expected = logits(model, ids)
    cached, cache = in_chunks(model, ids, [17, 1, 1, 5, 1, 15])
    torch.testing.assert_close(cached, expected, **CLOSE)
    assert cache.nbytes() == 2 * plan.cache_bytes(40, "float32")
    assert cache.nbytes() < 2 * 40 * 4 * 2 * 2 * base.shape.kv_dim
    assert (expected - logits(base.model, ids)).abs().max() > 0.01


@EVERY
def test_left_padded_batches_equal_single_sequences(
    compressed: Any, token_windows: Tensor, make: Make
) -> None:
    _, model = compressed(make)
    padded_equals_single(model, model, token_windows)


def test_maps_per_head_are_the_folded_ones(
    base: Base, statistics: Statistics, token_windows: Tensor
) -> None:
    """Folding changes where products are taken, not what comes out."""
    found = []
    for make in (equal, per_head):
        plan = replace(make(base.shape, None), start=Start("optimal", "none", 0))
        found.append(logits(rewrite(base, plan, statistics), token_windows[:2]))
    torch.testing.assert_close(found[1], found[0], **CLOSE)


def test_an_export_generates_the_same_tokens_without_vdcompress(
    base: Base, compressed: Any, tmp_path: Path
) -> None:
    """A fresh process that cannot import vdcompress: same logits, tokens and planned bytes."""
    plan, model = compressed(unequal)
    finished = Compressed.of(base, plan, model)
    verified = export(finished, tmp_path / "exported", prompt="values", new_tokens=12)
    assert verified.logit_difference <= 1e-4
    assert verified.cache_bytes_per_token == plan.cache_bytes(1, "float32")
    ids = torch.tensor([base.tokenizer("values")["input_ids"]])
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, use_cache=False, **settings)[0]
    assert verified.text == base.tokenizer.decode(expected)
    config = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert config["kv_layout"] == [layer.to_json() for layer in plan.layers]
