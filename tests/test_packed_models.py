"""Models whose latents are packed: every way to run them sees the same numbers."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vdcompress.artifact import Compressed, load_artifact
from vdcompress.evaluate import evaluate
from vdcompress.export import export
from vdcompress.load import Base
from vdcompress.modeling import latent_model
from vdcompress.modeling.cache import LatentCache
from vdcompress.modeling.packed_cache import PackedLayer, cache_for
from vdcompress.modeling.packed_latents import PackedLatents
from vdcompress.modeling.rounded_latents import RoundedLatents
from vdcompress.plan import Plan, make_plan
from vdcompress.rewrite import rewrite
from vdcompress.statistics import Statistics

CLOSE = {"atol": 1e-4, "rtol": 1e-4}


def per_channel_keys(plan: Plan) -> Plan:
    layers = [
        replace(
            layer,
            k_nope=replace(layer.k_nope, quantizer="per_channel" if layer.k_nope.packed else None),
        )
        for layer in plan.layers
    ]
    return replace(plan, layers=tuple(layers))


def plans(base: Base) -> dict[str, Plan]:
    shape = base.shape
    partial = shape.rotary_dim < shape.head_dim
    rotary = {"k_rotary_dim": shape.rotary_dim * shape.kv_heads} if partial else {}
    in_bits = make_plan(shape, v_bits=4, k_bits=4, sinks=0, window=0)
    return {
        "bits alone": in_bits,
        "exact tokens": replace(in_bits, sinks=3, window=6),
        "groups of tokens": per_channel_keys(
            make_plan(shape, v_bits=4, k_bits=4, sinks=2, window=0)
        ),
        "one side": make_plan(shape, v_bits=3, sinks=0, window=0),
        "shared and narrow": make_plan(
            shape, v_dim=24, k_dim=24, groups=1, v_bits=3, k_bits=2, sinks=0, window=5, **rotary
        ),
    }


PLANS = ("bits alone", "exact tokens", "groups of tokens", "one side", "shared and narrow")


@pytest.fixture(scope="module", params=PLANS)
def plan(request: Any, base: Base) -> Plan:
    return plans(base)[request.param]


@pytest.fixture(scope="module")
def single(base: Base, plan: Plan, statistics: Statistics) -> Any:
    return rewrite(base, plan, statistics)


@pytest.fixture(scope="module")
def model(single: Any) -> Any:
    """In float64: a number near the middle of two codes must not depend on how it was summed."""
    return copy.deepcopy(single).double()


@pytest.fixture
def prompt(token_windows: Tensor) -> Tensor:
    return token_windows[:3, :40]


def logits(model: Any, ids: Tensor, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        return model(ids, **kwargs).logits


def generate(model: Any, ids: Tensor, **kwargs: Any) -> Any:
    settings = {
        "max_new_tokens": 12,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
        "return_dict_in_generate": True,
        "attention_mask": torch.ones_like(ids),
    }
    return model.generate(ids, **settings | kwargs)


def cache_of(output: Any) -> LatentCache:
    return next(output[name] for name in ("cache", "past_key_values") if name in output)


def test_chunks_and_no_cache_give_the_same(model: Any, token_windows: Tensor) -> None:
    ids = token_windows[:2]
    expected = logits(model, ids, use_cache=False)
    torch.testing.assert_close(logits(model, ids), expected, **CLOSE)
    for chunk in (1, 16, 64):
        cache = cache_for(model.config)
        found = [logits(model, part, past_key_values=cache) for part in ids.split(chunk, dim=1)]
        torch.testing.assert_close(torch.cat(found, dim=1), expected, **CLOSE)


def test_a_forward_pass_fills_the_packed_cache(single: Any, plan: Plan, prompt: Tensor) -> None:
    with torch.no_grad():
        cache = cache_of(single(prompt))
    assert isinstance(cache.layers[0], PackedLayer)
    assert cache.nbytes() == 3 * plan.cache_bytes(40, "float32")


def test_generate_packs_what_was_planned(single: Any, plan: Plan, prompt: Tensor) -> None:
    cache = cache_of(generate(single, prompt))
    assert cache.get_seq_length() == 51
    assert cache.nbytes() == 3 * plan.cache_bytes(51, "float32")
    assert cache.nbytes() < 3 * replace(plan, layers=exact(plan)).cache_bytes(51, "float32")


def exact(plan: Plan) -> Any:
    return tuple(
        replace(
            layer,
            v=replace(layer.v, bits=16, quantizer=None),
            k_nope=replace(layer.k_nope, bits=16, quantizer=None),
            k_rotary=replace(layer.k_rotary, bits=16, quantizer=None),
        )
        for layer in plan.layers
    )


# Ways to generate; without a cache every token is rounded anew, by another path.


def test_greedy(model: Any, prompt: Tensor) -> None:
    expected = generate(model, prompt, use_cache=False).sequences
    assert torch.equal(generate(model, prompt).sequences, expected)


def test_greedy_is_what_a_naive_reading_says(model: Any, prompt: Tensor) -> None:
    """All latents of a packed cache dequantised at once, read by stock attention."""
    expected = generate(model, prompt[:1]).sequences[0]
    ids, cache = prompt[:1], cache_for(model.config)
    handles: list[tuple[Any, Any]] = []
    logits(model, ids[:, :-1], past_key_values=cache)
    attentions = [m for m in model.modules() if hasattr(m, "remembered")]

    def reading(module: Any) -> Any:
        def remembered(key: Tensor, value: Tensor, held: Any) -> tuple[Tensor, Tensor]:
            sides = type(module).remembered(module, key, value, held)
            assert all(isinstance(side, PackedLatents) for side in sides)
            handles.append(sides)
            keys, values = (side.dequantize(0, side.tokens) for side in sides)
            return keys, values

        return remembered

    for module in attentions:
        module.remembered = reading(module)
    try:
        token = ids[:, -1:]
        for _ in range(12):
            token = logits(model, token, past_key_values=cache)[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat((ids, token), dim=1)
    finally:
        for module in attentions:
            del module.remembered
    assert len(handles) == 12 * len(attentions)
    assert ids[0].tolist() == expected.tolist()


def test_sampling_follows_its_seed(model: Any, prompt: Tensor) -> None:
    drawn = []
    for cached in (True, False):
        torch.manual_seed(3)
        many = generate(model, prompt, do_sample=True, num_return_sequences=2, use_cache=cached)
        drawn.append(many.sequences)
    assert torch.equal(drawn[0], drawn[1])


def test_beams(model: Any, prompt: Tensor) -> None:
    beams = {"num_beams": 3, "num_return_sequences": 2}
    expected = generate(model, prompt, use_cache=False, **beams).sequences
    assert torch.equal(generate(model, prompt, **beams).sequences, expected)


def test_prompt_lookup(model: Any, prompt: Tensor) -> None:
    ids = torch.cat((prompt[:1], prompt[:1]), dim=1)
    expected = generate(model, ids, max_new_tokens=20).sequences
    looked_up = generate(model, ids, max_new_tokens=20, prompt_lookup_num_tokens=4)
    assert torch.equal(looked_up.sequences, expected)
    assert isinstance(cache_of(looked_up).layers[0], PackedLayer)


def test_assisted(base: Base, model: Any, prompt: Tensor) -> None:
    expected = generate(model, prompt[:1]).sequences
    helped = generate(model, prompt[:1], assistant_model=base.model)
    assert torch.equal(helped.sequences, expected)
    expected = generate(base.model, prompt[:1]).sequences
    helped = generate(base.model, prompt[:1], assistant_model=model)
    assert torch.equal(helped.sequences, expected)


def test_left_padding(base: Base, statistics: Statistics, token_windows: Tensor) -> None:
    """Without exact tokens and groups, padding changes nothing at all."""
    model = rewrite(base, plans(base)["bits alone"], statistics).double()
    lengths = (20, 13, 1)
    ids, mask = torch.zeros(3, 20, dtype=torch.long), torch.zeros(3, 20, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, 20 - length :] = token_windows[row, :length]
        mask[row, 20 - length :] = 1
    generated = generate(model, ids, attention_mask=mask).sequences
    for row, length in enumerate(lengths):
        alone = generate(model, token_windows[row : row + 1, :length]).sequences[0, length:]
        assert generated[row, 20:].tolist() == alone.tolist()


def test_padded_batches_with_and_without_a_cache(
    model: Any, plan: Plan, token_windows: Tensor
) -> None:
    """What padding holds differs, and tokens in groups of 32 share their scales with it."""
    if any(layer.k_nope.quantizer == "per_channel" for layer in plan.layers):
        pytest.skip("scales are shared with padding")
    ids, mask = token_windows[:2, :40].clone(), torch.ones(2, 40, dtype=torch.long)
    mask[1, :9] = 0
    expected = generate(model, ids, attention_mask=mask, use_cache=False).sequences
    assert torch.equal(generate(model, ids, attention_mask=mask).sequences, expected)


def test_other_attention_is_refused(model: Any, prompt: Tensor) -> None:
    for name in ("sdpa", "eager"):
        model.set_attn_implementation(name)
        try:
            with pytest.raises((AttributeError, TypeError), match="only the attention impl"):
                logits(model, prompt)
        finally:
            model.set_attn_implementation("vdcompress")


def test_full_width_in_many_bits_is_the_base(
    base: Base, statistics: Statistics, token_windows: Tensor
) -> None:
    """Rotations and folded means change nothing; eight bits change little, two bits much."""
    ids = token_windows[:4]
    expected = logits(base.model, ids).log_softmax(-1)
    errors = []
    for bits in (8, 4, 2):
        plan = make_plan(base.shape, v_bits=bits, k_bits=bits, sinks=0, window=0)
        model = rewrite(base, plan, statistics)
        errors.append((logits(model, ids).log_softmax(-1) - expected).abs().mean().item())
        for module in model.modules():
            if hasattr(module, "layout"):
                module.layout = exact(Plan(base.shape, (module.layout,)))[0]
        rest = logits(model, ids, use_cache=False).log_softmax(-1)
        torch.testing.assert_close(rest, expected, **CLOSE)
    assert errors[0] < errors[1] / 8 < errors[2] / 16


def test_training_sees_what_the_cache_holds(model: Any, prompt: Tensor) -> None:
    expected = logits(model, prompt)
    model.train()
    try:
        output = model(prompt, labels=prompt)
        torch.testing.assert_close(output.logits, expected, **CLOSE)
        output.loss.backward()
    finally:
        model.eval()
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name
        if "compress" in name or "k_proj.weight" in name:
            assert parameter.grad.abs().sum() > 0, name
    model.zero_grad()


def test_evaluation_goes_through_the_cache(
    model: Any, token_windows: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, packed = token_windows.flatten()[:257], []
    update = PackedLayer.update

    def watched(self: PackedLayer, *args: Any, **kwargs: Any) -> Any:
        packed.append(self)
        return update(self, *args, **kwargs)

    monkeypatch.setattr(PackedLayer, "update", watched)
    found = evaluate(model, tokens, window=64, windows=4)
    assert len(packed) == 4 * 2
    ids, labels = tokens[:-1].view(4, 64), tokens[1:]
    expected = nn.functional.cross_entropy(
        logits(model, ids, use_cache=False).flatten(0, 1), labels
    )
    assert found.perplexity == pytest.approx(expected.exp().item(), rel=1e-5)


def test_a_cache_of_another_kind_holds_what_it_is_given(model: Any, prompt: Tensor) -> None:
    with torch.no_grad():
        cache = LatentCache(2)
        model(prompt, past_key_values=cache)
    assert isinstance(cache.layers[0].keys, Tensor)


def test_generate_says_which_caches_round_nothing(
    model: Any, prompt: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(latent_model.logger, "warning", said.append)
    generate(model, prompt)
    generate(model, prompt, past_key_values=cache_for(model.config))
    assert said == []
    generate(model, prompt, cache_implementation="static")
    assert len(said) == 1
    assert said[0].startswith("a StaticCache keeps the latents of this model in 16 bits")


def test_rounded_latents_speak_up_too() -> None:
    x = torch.zeros(1, 1, 2, 4)
    both = RoundedLatents(x, x, ((4, torch.ones(2, 2, dtype=torch.bool)),))
    assert torch.equal(both.dequantize(0, 2), x)
    with pytest.raises(TypeError, match="only the attention implementation"):
        nn.functional.softmax(both, dim=-1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("base", "plan"), [*(("gpt_neox", name) for name in PLANS), ("llama", PLANS[-1])], indirect=True
)
def test_a_fresh_process_packs_the_same(base: Base, plan: Plan, single: Any, tmp_path: Any) -> None:
    compressed = Compressed.of(base, plan, single, calibration=None)
    folder = tmp_path / "exported"
    seen = export(compressed, folder, prompt="def main(", new_tokens=24)
    ids = torch.tensor([compressed.tokenizer("def main(")["input_ids"]])
    written = generate(load_artifact(folder).model, ids, max_new_tokens=24)
    assert seen.text == compressed.tokenizer.decode(written.sequences[0])
    assert cache_of(written).nbytes() == plan.cache_bytes(ids.shape[1] + 23, "float32")
    config = json.loads((folder / "config.json").read_text())
    assert (config["kv_sinks"], config["kv_window"]) == (plan.sinks, plan.window)
    assert Plan.from_json(json.loads((folder / "vdcompress.json").read_text())["plan"]) == plan


SIDE_BY_SIDE = """
import sys, torch
sys.modules["vdcompress"] = None
from transformers import AutoModelForCausalLM

ids = torch.arange(1, 41)[None]
greedy = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0, "eos_token_id": None}


def said(model, **options):
    with torch.no_grad():
        logits = [model(ids, use_cache=use_cache).logits for use_cache in (True, False)]
    mask = torch.ones_like(ids)
    return *logits, model.generate(ids, attention_mask=mask, **greedy, **options)


models, alone = [], []
for folder in sys.argv[1:]:
    models.append(AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True))
    alone.append(said(models[-1]))
for model, other, expected in zip(models, reversed(models), alone):
    assert all(map(torch.equal, said(model), expected))
    assert torch.equal(said(model, assistant_model=other)[-1], expected[-1])
    model.set_attn_implementation("sdpa")
    model.set_attn_implementation("vdcompress")
    assert all(map(torch.equal, said(model), expected))
"""


@pytest.mark.slow
@pytest.mark.parametrize("base", ["gpt_neox"], indirect=True)
@pytest.mark.parametrize("packed_first", [True, False])
def test_two_exports_in_one_process(
    base: Base, statistics: Statistics, packed_first: bool, tmp_path: Path
) -> None:
    """Each folder's code is a copy, whose classes the other does not know."""
    folders = []
    for name, choice in (
        ("packed", {"bits": 4, "sinks": 1, "window": 3}),
        ("exact", {"v_dim": 32}),
    ):
        plan = make_plan(base.shape, **choice)
        model = rewrite(base, plan, statistics)
        export(Compressed.of(base, plan, model, calibration=None), tmp_path / name)
        folders.append(tmp_path / name)
    ordered = folders if packed_first else folders[::-1]
    env = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", SIDE_BY_SIDE, *ordered]
    ended = subprocess.run(command, env=env, check=False, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def test_evaluation_without_the_cache_is_that_through_it(model: Any, token_windows: Tensor) -> None:
    through, without = (
        evaluate(model, token_windows.flatten(), window=40, windows=3, through_cache=way)
        for way in (True, False)
    )
    assert through.perplexity == pytest.approx(without.perplexity, rel=1e-9)
