"""Steps that read places and counts on the device, as a CUDA graph replays them.

On CUDA, or else in Triton's interpreter, where a captured step is one that is called again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

CUDA = torch.cuda.is_available()
pytest.importorskip("triton", minversion=None if CUDA else "3.9", reason="needs Triton")

from transformers import GPTNeoXConfig, LlamaConfig  # noqa: E402

from decode_reference import drawn, error  # noqa: E402
from naive_packed import LAYERS  # noqa: E402
from vdcompress import families  # noqa: E402
from vdcompress.modeling import graphed_steps, packed_attention, packed_cache  # noqa: E402
from vdcompress.modeling.cache import GrowingLayer, LatentCache  # noqa: E402
from vdcompress.modeling.counted_cache import CountedCache  # noqa: E402
from vdcompress.modeling.graphed_steps import GraphedSteps  # noqa: E402
from vdcompress.modeling.layout import LayerLayout, NopePart, Part, RotaryPart  # noqa: E402
from vdcompress.modeling.packed_cache import PackedLayer, cache_for  # noqa: E402
from vdcompress.modeling.step_counts import Place, common  # noqa: E402
from vdcompress.modeling.triton_decode import attend_packed  # noqa: E402
from vdcompress.plan import make_plan  # noqa: E402

DEVICE = torch.device("cuda" if CUDA else "cpu")
HALF = torch.float16
SCALE = 0.3
PROMPT, STEPS = (60, 150) if CUDA else (62, 4)  # the first room has 64 tokens
BITS = "per token, a latent for each head"
COUNTABLE = (BITS, "grouped queries, unequal groups", "only rotary keys, in bits")
EXACT = LayerLayout(Part(2, 24), NopePart(2, 16), RotaryPart(2, 0))
TINY: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
    "eos_token_id": None,
}
BASES = {
    "gpt_neox": GPTNeoXConfig(**TINY, rotary_pct=0.25, num_hidden_layers=2 if CUDA else 1),
    "llama": LlamaConfig(**TINY, num_key_value_heads=2, num_hidden_layers=2),
}
PLANS: dict[str, dict[str, Any]] = {
    "exact": {"v_dim": 32, "k_dim": 32},
    "8 bits": {"bits": 8, "sinks": 0, "window": 0},
    "sinks and window": {"bits": 4, "sinks": 2, "window": 5},
    "by channel": {"bits": 4, "k_rotary_bits": 4, "sinks": 0, "window": 0},
    "values alone": {"v_dim": 32, "v_bits": 3, "sinks": 1, "window": 3},
}
IN_THE_INTERPRETER = (("gpt_neox", "sinks and window", True), ("llama", "8 bits", False))
Captured = list[Callable[[], Any]]


@pytest.fixture(autouse=True)
def captured(monkeypatch: pytest.MonkeyPatch) -> Iterator[Captured]:
    """Return the steps that were captured; a CPU calls them again, with the kernel for CUDA."""
    found: Captured = []
    real = graphed_steps.CAPTURES["cuda"]

    def capture(call: Callable[[], Any]) -> Callable[[], Any]:
        found.append(call)
        return real(call) if CUDA else call

    monkeypatch.setitem(graphed_steps.CAPTURES, DEVICE.type, capture)
    monkeypatch.setattr(packed_cache, "ROLLBACK", 2)  # so that recent tokens move soon
    if not CUDA:
        monkeypatch.setitem(packed_attention._kernels, "cpu", counted_by_triton)
    with torch.no_grad():
        yield found


def counted_by_triton(
    query: Tensor, key: Any, value: Any, mask: Tensor | None, scaling: float
) -> Tensor | None:
    """Leave to the interpreter what nothing else can do."""
    return attend_packed(query, key, value, mask, scaling) if key.counted else None


def sides(layout: LayerLayout, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries of 4 heads, keys and values of two sequences."""
    shapes = (
        (4, layout.k_head_dim),
        (layout.k_groups, layout.k_head_dim),
        (layout.v_groups, layout.v_head_dim),
    )
    q, k, v = (drawn(2, g, tokens, w, seed=3, dtype=HALF) for g, w in shapes)
    return q, k, v


def held(cache: LatentCache) -> list[Tensor]:
    """Return all that a cache of one layer stores."""
    (layer,) = cache.layers
    if isinstance(layer, GrowingLayer):
        return [layer.keys, layer.values]
    found = []
    for part in layer.parts:
        if part.packed is None:
            found.append(part.exact.shown)
        else:
            recent = part.recent.view()[0] if part.recent.keep else part.sinks.shown
            found += [part.sinks.shown, recent, *part.packed.shown]
    return [x for x in found if x is not None]


def cache_of(layout: LayerLayout, sinks: int = 0, window: int = 0) -> LatentCache:
    packed = layout.packed
    return LatentCache([PackedLayer(layout, sinks, window) if packed else GrowingLayer()])


@pytest.mark.parametrize("name", [*COUNTABLE, "exact"])
@pytest.mark.parametrize(("sinks", "window"), [(0, 0), (3, 6)])
def test_a_counted_step_stores_and_reads_what_another_does(
    name: str, sinks: int, window: int
) -> None:
    layout = EXACT if name == "exact" else LAYERS[name]
    prompt, tokens = 124, 134  # past the end of a room, and of the buffer of recent tokens
    query, key, value = (x.to(DEVICE) for x in sides(layout, tokens))
    one, other = (cache_of(layout, sinks, window) for _ in range(2))
    for cache in (one, other):
        cache.update(key[:, :, :prompt], value[:, :, :prompt], 0)
    counted = CountedCache(one)
    for token in range(prompt, tokens):
        place = counted.place() or counted.make_room()
        assert place is not None
        counted.counts.refresh(place)
        q, k, v = (x[:, :, token : token + 1] for x in (query, key, value))
        for _ in range(2):  # it may be done again
            latents = counted.update(k, v, 0)
        plain = other.update(k, v, 0)
        if token % 5 == 2 and layout.packed:
            found, expected = (attend_packed(q, *x, None, SCALE) for x in (latents, plain))
            assert found is not None
            assert error(found, expected) < 3e-3
        counted.advance()

    assert one.get_seq_length() == tokens
    assert one.nbytes() == other.nbytes()
    for x, y in zip(held(one), held(other), strict=True):
        assert torch.equal(x, y)


def count(counted: CountedCache, key: Tensor, value: Tensor, start: int, stop: int) -> None:
    for token in range(start, stop):
        place = counted.place() or counted.make_room()
        assert place is not None
        counted.counts.refresh(place)
        counted.update(key[:, :, token : token + 1], value[:, :, token : token + 1], 0)
        counted.advance()


@pytest.mark.parametrize("layout", [LAYERS[BITS], EXACT])
@pytest.mark.parametrize("back", [1, 7, 40])
def test_what_was_counted_can_be_taken_back(layout: LayerLayout, back: int) -> None:
    _, key, value = (x.to(DEVICE) for x in sides(layout, 90))
    one, other = (cache_of(layout, 2, 4) for _ in range(2))
    for cache, stop in ((one, 70), (other, 78)):
        cache.update(key[:, :, :stop], value[:, :, :stop], 0)
    counted = CountedCache(one)
    count(counted, key, value, 70, 78)
    for cache in (one, other):
        cache.crop(-back)
    count(counted, key, value, 80, 85)
    other.update(key[:, :, 80:85], value[:, :, 80:85], 0)
    assert one.get_seq_length() == other.get_seq_length() == 83 - back
    if (
        back <= packed_cache.ROLLBACK or layout is EXACT
    ):  # else what is exact again has been rounded, here and there
        for x, y in zip(held(one), held(other), strict=True):
            assert torch.equal(x, y)


def test_a_cache_that_was_emptied_is_counted_anew() -> None:
    layout = LAYERS[BITS]
    _, key, value = (x.to(DEVICE) for x in sides(layout, 40))
    cache, other = (cache_of(layout) for _ in range(2))
    cache.update(key[:, :, :20], value[:, :, :20], 0)
    counted = CountedCache(cache)
    count(counted, key, value, 20, 22)
    cache.reset()
    for each in (cache, other):
        each.update(key[:, :, :30], value[:, :, :30], 0)
    count(counted, key, value, 30, 33)
    other.update(key[:, :, 30:33], value[:, :, 30:33], 0)
    for x, y in zip(held(cache), held(other), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize(
    ("layout", "tokens"),
    [
        (LAYERS["channels everywhere"], 40),  # packed in groups of tokens
        (LAYERS[BITS], 6),  # nothing is packed yet
    ],
)
def test_where_a_step_is_not_like_the_others_it_is_not_counted(
    layout: LayerLayout, tokens: int
) -> None:
    cache = cache_of(layout, 2, 4)
    _, key, value = (x.to(DEVICE) for x in sides(layout, tokens))
    cache.update(key, value, 0)
    assert CountedCache(cache).make_room() is None


def test_places_must_agree() -> None:
    assert common([Place(token=3), Place(source=0, packed=2)]) == Place(3, None, 0, 2)
    assert common([Place(token=3), Place(token=4)]) is None


def model_of(base: str, plan: str, **changed: Any) -> Any:
    config, family = BASES[base], families.get(base)
    asked = make_plan(family.shape(config), **PLANS[plan] | changed)
    with torch.random.fork_rng():
        torch.manual_seed(4)
        model = family.compressed_class()(family.compressed_config(config, asked))
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.2)
    return model.to(DEVICE, HALF).eval()


def prompts(tokens: int = 20) -> Tensor:
    return torch.randint(1, 96, (2, tokens), generator=torch.Generator().manual_seed(6)).to(DEVICE)


def stepped(step: Any, model: Any, ids: Tensor, mask: Tensor, steps: int) -> list[Tensor]:
    """Return the logits of steps behind a prompt, each with a token of ``ids``."""
    cache, prompt = cache_for(model.config), ids.shape[1] - steps
    found = []
    for start, stop in ((0, prompt), *((t, t + 1) for t in range(prompt, ids.shape[1]))):
        seen = mask[:, :stop]
        positions = (seen.cumsum(-1) - 1).clamp_min(0)[:, start:stop]
        call = model if start == 0 else step
        given = {"attention_mask": seen, "position_ids": positions, "use_cache": True}
        name = "cache" if "cache" in graphed_steps.OUTPUT_CACHE else "past_key_values"
        output = call(input_ids=ids[:, start:stop], **{name: cache}, **given)
        assert output[name] is cache
        found.append(output.logits[:, -1].float().clone())
    assert cache.get_seq_length() == ids.shape[1]
    return found[1:]


@pytest.mark.parametrize(
    ("base", "plan", "padded"),
    [
        (base, plan, padded)
        for base in BASES
        for plan in PLANS
        if plan != "by channel"
        for padded in (False, True)
        if CUDA or (base, plan, padded) in IN_THE_INTERPRETER
    ],
)
def test_replayed_steps_are_a_models_steps(
    captured: Captured, base: str, plan: str, padded: bool
) -> None:
    model, ids = model_of(base, plan), prompts(PROMPT + STEPS)
    mask = torch.ones_like(ids)
    mask[0, : 9 if padded else 0] = 0
    steps = GraphedSteps(model)

    found = stepped(steps, model, ids, mask, STEPS)

    assert captured
    assert len(captured) <= (10 if CUDA else 3)  # rooms grow, and the mask
    for one, other in zip(found, stepped(model, model, ids, mask, STEPS), strict=True):
        assert (one - other).abs().max() < 0.02 * other.std()


def test_a_prompt_too_short_to_pack_is_called_until_it_is_not(captured: Captured) -> None:
    model, ids = model_of("gpt_neox", "sinks and window"), prompts(12)
    mask = torch.ones_like(ids)
    found = stepped(GraphedSteps(model), model, ids, mask, 6)  # behind 6 tokens, of 2 and 5
    assert len(captured) == 1
    for one, other in zip(found, stepped(model, model, ids, mask, 6), strict=True):
        assert (one - other).abs().max() < 0.02 * other.std()


def test_scales_by_channel_are_called(captured: Captured) -> None:
    model, ids = model_of("gpt_neox", "by channel"), prompts(40)
    mask = torch.ones_like(ids)
    found = stepped(GraphedSteps(model), model, ids, mask, 3)
    assert not captured
    for one, other in zip(found, stepped(model, model, ids, mask, 3), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("plan", ["exact", "sinks and window"])
def test_generate_replays_and_says_the_same(captured: Captured, plan: str) -> None:
    model, ids = model_of("gpt_neox", plan), prompts()
    settings: dict[str, Any] = {
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": 40 if CUDA else 3,
        "do_sample": False,
        "pad_token_id": 0,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    plain = model.generate(ids, **settings, disable_compile=True)
    assert not captured
    found = model.generate(ids, **settings)
    assert len(captured) >= 1
    for one, other in zip(found.logits, plain.logits, strict=True):
        assert (one - other).abs().max() < 0.02 * other.std()
    assert torch.equal(found.sequences, plain.sequences)


@pytest.mark.parametrize(
    "way", ["beams", "one token", "hook", "float32", "hidden states", "a prompt in single tokens"]
)
def test_what_a_graph_cannot_do_is_called(captured: Captured, way: str) -> None:
    model, ids = model_of("gpt_neox", "8 bits"), prompts()
    seen = []
    if way == "hook":
        model.gpt_neox.layers[0].register_forward_hook(lambda *_: seen.append(1))
    model = model.float() if way == "float32" else model
    given = {
        "beams": {"num_beams": 2},
        "hidden states": {"output_hidden_states": True, "return_dict_in_generate": True},
    }.get(way, {})
    if way == "one token":
        given = {"max_new_tokens": 1}
    if way == "a prompt in single tokens":
        ids, given = ids[:, :2], {"prefill_chunk_size": 1, "max_new_tokens": 1}
    mask = torch.ones_like(ids)
    model.generate(ids, **{"max_new_tokens": 3, "pad_token_id": 0, "attention_mask": mask} | given)
    assert not captured
    assert len(seen) == 3 * (way == "hook")


def test_a_step_that_cannot_be_captured_is_called(
    captured: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_call: Any) -> Any:
        captured.append(refuse)
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setitem(graphed_steps.CAPTURES, DEVICE.type, refuse)
    model, ids = model_of("gpt_neox", "sinks and window"), prompts(30)
    mask = torch.ones_like(ids)
    found = stepped(GraphedSteps(model), model, ids, mask, 6)
    assert captured == [refuse]
    for one, other in zip(found, stepped(model, model, ids, mask, 6), strict=True):
        assert (one - other).abs().max() < 0.02 * other.std()


def test_one_that_follows_another_prompt_is_captured_anew(captured: Captured) -> None:
    model = model_of("gpt_neox", "8 bits")
    steps = GraphedSteps(model)
    for ids in (prompts(24), prompts(30)[:1]):
        found = stepped(steps, model, ids, torch.ones_like(ids), 3)
        for one, other in zip(
            found, stepped(model, model, ids, torch.ones_like(ids), 3), strict=True
        ):
            assert (one - other).abs().max() < 0.02 * other.std()
    assert len(captured) == 2
