"""Measuring one model with one kind of cache: what is run, counted and compared."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import DynamicCache, GPTNeoXForCausalLM

from vdcompress import decode_speed
from vdcompress.artifact import Compressed, load_artifact
from vdcompress.cache_kinds import DYNAMIC, OWN, QUANTIZED, STATIC, CacheKind, stored_nbytes
from vdcompress.cache_kinds import unavailable as reason_of
from vdcompress.decode_speed import Contender, Pass, fill
from vdcompress.plan import Plan
from vdcompress.speed_rounds import median_peak, ratios, rounds, spread

LAYERS, NUMBERS = 2, 2 * 2 * 4 * 16  # of the tiny GPT-NeoX: keys and values of all layers
FP8 = next(kind for kind in QUANTIZED if kind.name == "fp8")


@pytest.fixture(scope="module")
def compressed(tiny_run: Path) -> Compressed:
    return load_artifact(tiny_run)


@pytest.fixture(scope="module")
def base(tiny_neox: Path, compressed: Compressed) -> tuple[Any, Any]:
    """Return the base's model and layouts."""
    layouts = (compressed.plan.shape.full_layout(),) * LAYERS
    return GPTNeoXForCausalLM.from_pretrained(tiny_neox, dtype=torch.float32).eval(), layouts


def contender(name: str, kind: CacheKind = DYNAMIC, model: Any = None) -> Contender:
    model = model or SimpleNamespace(device=torch.device("cpu"))
    return Contender(name, model, (), kind)


def passes(*speeds: float, peak: int | None = None) -> list[Pass]:
    return [Pass(speed, 0, 0, peak) for speed in speeds]


@pytest.mark.parametrize("chunk", [7, 4096])
@pytest.mark.parametrize("kind", [DYNAMIC, STATIC])
def test_a_cache_is_filled_whatever_its_chunks(
    base: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, chunk: int, kind: CacheKind
) -> None:
    monkeypatch.setattr(decode_speed, "CHUNK", chunk)
    model, layouts = base
    cache = kind.make(model.config, 40)
    fill(cache, layouts, 30, 3, model)

    assert int(cache.get_seq_length()) == 30
    for layer in cache.layers:
        for held in (layer.keys[:, :, :30], layer.values[:, :, :30]):
            assert held.shape == (3, 4, 30, 16)
            assert 0.7 < float(held.std()) < 1.3
            assert bool((held.abs().amax(-1) > 0).all())
    rooms = 40 if kind is STATIC else 30
    assert stored_nbytes(cache, 30) == (4 * NUMBERS * 3 * 30, 4 * NUMBERS * 3 * rooms)


@pytest.mark.parametrize("kind", [DYNAMIC, STATIC, OWN], ids=lambda kind: kind.name)
@torch.inference_mode()
def test_steps_write_what_generate_does(
    base: tuple[Any, Any], compressed: Compressed, kind: CacheKind
) -> None:
    model: Any = compressed.model if kind is OWN else base[0]
    prompt = torch.randint(1, 264, (2, 9), generator=torch.Generator().manual_seed(3))
    expected = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=6,
        min_new_tokens=6,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
    )

    cache = kind.make(model.config, 15)
    ids, found = prompt, [prompt]
    for _ in range(6):
        ids = decode_speed._step(model, cache, ids)
        found.append(ids)

    assert torch.equal(torch.cat(found, 1), expected)


def test_decoding_counts_the_context_and_continues_behind_it(
    base: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, layouts = base
    made: list[DynamicCache] = []

    def make(config: Any, tokens: int) -> DynamicCache:
        assert tokens == 50 + 4 + 1
        made.append(DynamicCache(config=config))
        return made[0]

    found = decode_speed.decode(Contender("x", model, layouts, CacheKind("x", make)), 50, 2, 4)

    assert found.cache_bytes == found.allocated_bytes == 4 * NUMBERS * 2 * 50
    assert made[0].get_seq_length() == 50 + 1 + 4
    assert found.tokens_per_second > 0
    weights = sum(p.numel() * 4 for p in model.parameters())
    assert found.peak_bytes is None or found.peak_bytes >= weights


def captured_on_cpu(call: Any) -> Any:
    """Do what a graph does as far as a cache tells: the work is made often, and replayed."""
    for _ in range(decode_speed.GRAPH_STEPS):
        call()
    return call


@pytest.mark.parametrize("kind", [DYNAMIC, STATIC, OWN], ids=lambda kind: kind.name)
def test_a_replayed_step_counts_the_context(
    base: tuple[Any, Any], compressed: Compressed, monkeypatch: pytest.MonkeyPatch, kind: CacheKind
) -> None:
    """A static cache goes on with each replay, and must have room for all of them."""
    monkeypatch.setattr(decode_speed, "captured", captured_on_cpu)
    model, layouts = base if kind is not OWN else (compressed.model, compressed.plan.layers)

    found = decode_speed.replay(Contender("x", model, layouts, kind), 50, 2, 7)

    plain = decode_speed.decode(Contender("x", model, layouts, kind), 50, 2, 1)
    assert found.cache_bytes == plain.cache_bytes
    assert found.tokens_per_second > 0


def test_a_prompt_is_read_once_into_an_empty_cache(base: tuple[Any, Any]) -> None:
    found = decode_speed.prefill(Contender("x", *base, DYNAMIC), 20, 3)

    assert found.cache_bytes == 4 * NUMBERS * 3 * 20


def test_own_caches_say_their_bytes_themselves(compressed: Compressed) -> None:
    plan: Plan = compressed.plan
    measured = Contender("own", compressed.model, plan.layers, OWN)

    found = decode_speed.decode(measured, 100, 2, 1)

    assert found.cache_bytes == 2 * plan.cache_bytes(100, "float32")
    assert found.allocated_bytes >= found.cache_bytes


def test_an_fp8_cache_counts_a_byte_for_each_number(base: tuple[Any, Any]) -> None:
    model, layouts = base
    if reason_of(FP8, model.config):
        pytest.skip("this transformers has no fp8 cache")

    found = decode_speed.decode(Contender("fp8", model, layouts, FP8), 64, 1, 1)

    scales = 2 * LAYERS * 4
    assert found.cache_bytes == NUMBERS * 64 + scales


class Parts(torch.Tensor):
    """A tensor of others, as packages for few bits have them."""

    @staticmethod
    def __new__(cls, *parts: torch.Tensor) -> Parts:
        return torch.Tensor._make_wrapper_subclass(cls, (1000,), dtype=torch.float32)

    def __init__(self, *parts: torch.Tensor) -> None:
        self.codes, self.scale = parts

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "scale"], None

    @classmethod
    def __torch_dispatch__(cls, *_args: Any, **_kwargs: Any) -> Any:
        raise NotImplementedError


def test_what_quantised_layers_hold_is_counted_where_it_lies() -> None:
    codes, scale = torch.zeros(10, dtype=torch.uint8), torch.zeros(3, dtype=torch.float16)
    layer = SimpleNamespace(
        keys=torch.zeros(5),
        values=None,
        _quantized_keys=Parts(codes, scale),
        _quantized_values=(codes, {"scale": scale, "shape": (2, 5), "nested": [scale]}),
    )

    assert stored_nbytes(SimpleNamespace(layers=[layer]), 1) == (20 + 16 + 22, 20 + 16 + 22)


def test_all_take_turns_in_every_round() -> None:
    turns: list[str] = []

    def measure(one: Contender) -> Pass:
        turns.append(one.name)
        return passes(len(turns))[0]

    done: list[int] = []
    found = rounds([contender("a"), contender("b")], measure, 3, done.append)

    assert turns == ["a", "b"] * 3
    assert done == [1, 2, 3]
    assert found == {"a": passes(1, 3, 5), "b": passes(2, 4, 6)}


@pytest.mark.parametrize(
    ("error", "kind", "reason"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), OWN, "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: x"), OWN, "out of memory"),
        (MemoryError(), DYNAMIC, "out of memory"),
        (ValueError("groups of 64\nmore"), FP8, "ValueError: groups of 64"),
    ],
)
def test_what_cannot_be_measured_has_its_reason_and_the_rest_goes_on(
    error: Exception, kind: CacheKind, reason: str
) -> None:
    turns: list[str] = []

    def measure(one: Contender) -> Pass:
        turns.append(one.name)
        if one.name == "bad":
            raise error
        return passes(7)[0]

    found = rounds([contender("bad", kind), contender("good")], measure, 2)

    assert found == {"bad": reason, "good": passes(7, 7)}
    assert turns == ["bad", "good", "good"]


def test_a_fault_of_ours_is_not_hidden_in_a_row() -> None:
    def measure(_one: Contender) -> Pass:
        raise ValueError("wrong shape")

    for kind in (OWN, DYNAMIC):
        with pytest.raises(ValueError, match="wrong shape"):
            rounds([contender("x", kind)], measure, 1)


def test_ratios_are_of_one_round() -> None:
    found = {"mine": passes(10, 40, 90), "base": passes(5, 10, 100), "gone": "out of memory"}

    assert ratios(found, "mine", ("base", "gone", "absent")) == {"base": 2.0}
    assert ratios(found, "gone", ("base",)) == {}
    assert spread(passes(8, 10, 14)) == pytest.approx(0.6)
    assert median_peak([*passes(1, 1, peak=5), *passes(1, peak=9), *passes(1)]) == 5
    assert median_peak(passes(1)) is None
