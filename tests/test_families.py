"""The contract of every family, found through ``families.available()`` (fixture ``base``)."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from observed import observe
from vdcompress import families, initializers
from vdcompress.errors import ModelError
from vdcompress.load import Base, load_config
from vdcompress.modeling.cache import LatentCache
from vdcompress.modeling.room import BLOCK
from vdcompress.plan import Plan, Start, make_plan
from vdcompress.rewrite import rewrite
from vdcompress.statistics import Statistics

CLOSE = {"atol": 1e-4, "rtol": 1e-4}


@pytest.fixture(scope="module")
def plan(base: Base) -> Plan:
    return make_plan(base.shape, v_dim=8 * base.shape.kv_heads)


@pytest.fixture(scope="module")
def model(base: Base, plan: Plan, statistics: Statistics) -> Any:
    return rewrite(base, plan, statistics)


@pytest.fixture(scope="module")
def prompt(token_windows: Tensor) -> Tensor:
    return token_windows[:3, :20]


def logits(model: Any, ids: Tensor, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        return model(ids, **kwargs).logits


def generate(model: Any, ids: Tensor, **kwargs: Any) -> Any:
    settings = {
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": 8,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
        "return_dict_in_generate": True,
    }
    return model.generate(ids, **settings | kwargs)


# The adapter.


def test_shape_from_the_config_alone(base: Base) -> None:
    shape = load_config(base.folder).shape
    assert shape == base.shape
    assert (shape.layers, shape.hidden, shape.heads, shape.head_dim) == (2, 64, 4, 16)
    frequencies, _ = base.family.rotary(base.config)
    assert shape.rotary_dim == 2 * len(frequencies)
    assert shape.family == base.config.model_type == base.family.model_type


def test_weights_have_the_shape(base: Base) -> None:
    shape = base.shape
    bias = base.family.projection_bias(base.config)
    modules = base.family.attention_modules(base.model)
    assert len(modules) == shape.layers
    for attention in modules:
        weights = base.family.weights(attention)
        assert weights.q.weight.shape == (shape.heads * shape.head_dim, shape.hidden)
        assert weights.k.weight.shape == (shape.kv_dim, shape.hidden)
        assert weights.v.weight.shape == (shape.kv_dim, shape.hidden)
        assert weights.o.weight.shape == (shape.hidden, shape.heads * shape.head_dim)
        for name in "qkvo":
            assert (getattr(weights, name).bias is not None) == bias[name]


def test_unpacked_weights_are_the_attention(base: Base, token_windows: Tensor) -> None:
    for seen in observe(base, token_windows[:2]):
        torch.testing.assert_close(seen.y, seen.given, atol=1e-5, rtol=1e-4)


def test_output_projection_takes_what_attention_returned(base: Base) -> None:
    attention = base.family.attention_modules(base.model)[0]
    weights = base.family.weights(attention)
    torch.testing.assert_close(
        dict(base.family.output_projection(attention).named_parameters())["weight"].detach(),
        weights.o.weight,
    )
    name = base.family.parameter_prefix(0) + base.family.output_name + ".weight"
    assert torch.equal(base.model.get_parameter(name).detach(), weights.o.weight)


def test_lengthening_rope_is_refused(base: Base) -> None:
    config = type(base.config).from_dict(base.config.to_dict())
    config.rope_parameters["rope_type"] = "dynamic"
    with pytest.raises(ModelError, match="dynamic"):
        base.family.rotary(config)


def test_unknown_and_compressed_types_are_refused(base: Base, model: Any) -> None:
    with pytest.raises(ModelError, match="no family") as caught:
        families.get("mamba")
    assert all(name in caught.value.hint for name in families.available())
    with pytest.raises(ModelError, match="compressed already"):
        families.get(model.config.model_type)


# Full width.


@pytest.mark.parametrize("refit", ["none", "local"])
@pytest.mark.parametrize("name", initializers.available())
def test_full_width_is_the_base(
    base: Base,
    statistics: Statistics,
    token_windows: Tensor,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    refit: str,
) -> None:
    full = make_plan(base.shape, v_dim=base.shape.kv_dim, start=Start(name, refit, 1))
    expected = logits(base.model, token_windows[:2])
    exact = rewrite(base, full, statistics)
    torch.testing.assert_close(logits(exact, token_windows[:2]), expected, **CLOSE)
    room = sys.modules["vdcompress.rewrite"]
    monkeypatch.setattr(room, "keep_everything", initializers.get(name).solve)
    solved = rewrite(base, full, statistics)
    torch.testing.assert_close(logits(solved, token_windows[:2]), expected, **CLOSE)


def test_narrow_is_not_the_base(base: Base, model: Any, token_windows: Tensor) -> None:
    difference = logits(model, token_windows[:2]) - logits(base.model, token_windows[:2])
    assert difference.abs().max() > 0.01


def test_rewriting_leaves_the_base_alone(base: Base, plan: Plan, statistics: Statistics) -> None:
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    again = rewrite(base, plan, statistics)
    for name, tensor in base.model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert not again.training
    shared = base.model.get_input_embeddings().weight
    assert again.get_input_embeddings().weight.data_ptr() == shared.data_ptr()
    tied = again.get_output_embeddings().weight is again.get_input_embeddings().weight
    assert tied == base.config.tie_word_embeddings


def test_rewriting_is_repeatable(base: Base, plan: Plan, model: Any, statistics: Any) -> None:
    again = rewrite(base, plan, statistics).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())


# The states between layers, which a finetune compares with the base's.


def test_states_after_each_layer_are_the_bases_at_full_width(
    base: Base, model: Any, statistics: Statistics, token_windows: Tensor
) -> None:
    ids = token_windows[:2]
    full = rewrite(base, make_plan(base.shape, v_dim=base.shape.kv_dim), statistics)
    expected = states(base.model, ids)
    assert len(expected) == base.shape.layers + 1
    assert expected[-1].equal(base.model.base_model(ids).last_hidden_state)
    for found, wanted in zip(states(full, ids), expected, strict=True):
        torch.testing.assert_close(found, wanted, **CLOSE)
    apart = [(a - b).abs().max() for a, b in zip(states(model, ids), expected, strict=True)]
    assert apart[0] == 0
    assert min(apart[1:]) > 0.01


def states(model: Any, ids: Tensor) -> tuple[Tensor, ...]:
    with torch.no_grad():
        found: tuple[Tensor, ...] = model.base_model(ids, output_hidden_states=True).hidden_states
    return found


# The cache.


@pytest.mark.parametrize("chunk", [1, 7, 31])
@pytest.mark.parametrize("stock", [False, True], ids=["ours", "stock"])
def test_cached_decode_equals_uncached(
    base: Base, model: Any, token_windows: Tensor, chunk: int, stock: bool
) -> None:
    ids = token_windows[:2]
    expected = logits(model, ids)
    cache = None if stock else LatentCache(base.shape.layers)
    pieces = []
    with torch.no_grad():
        for part in ids.split(chunk, dim=1):
            output = model(part, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            pieces.append(output.logits)
    torch.testing.assert_close(torch.cat(pieces, dim=1), expected, **CLOSE)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_other_attention_functions_agree(model: Any, token_windows: Tensor, attention: str) -> None:
    ids = token_windows[:2, :40]
    expected = logits(model, ids)
    ours = model.config._attn_implementation
    assert ours == "vdcompress"
    model.set_attn_implementation(attention)
    try:
        torch.testing.assert_close(logits(model, ids), expected, **CLOSE)
        cache = LatentCache(model.config.num_hidden_layers)
        logits(model, ids[:, :30], past_key_values=cache)
        last = logits(model, ids[:, 30:], past_key_values=cache)
    finally:
        model.set_attn_implementation(ours)
    torch.testing.assert_close(last, expected[:, 30:], **CLOSE)


def test_eager_attention_returns_weights(model: Any, prompt: Tensor) -> None:
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            weights = model(prompt, output_attentions=True).attentions
    finally:
        model.set_attn_implementation("vdcompress")
    assert [tuple(w.shape) for w in weights] == [(3, 4, 20, 20)] * 2
    torch.testing.assert_close(weights[0].sum(-1), torch.ones(3, 4, 20))


def test_left_padded_batches_equal_single_sequences(model: Any, token_windows: Tensor) -> None:
    sequences = [token_windows[0, :20], token_windows[1, :13], token_windows[2, :1]]
    ids = torch.zeros(3, 20, dtype=torch.long)
    mask = torch.zeros(3, 20, dtype=torch.long)
    for row, sequence in enumerate(sequences):
        ids[row, 20 - len(sequence) :] = sequence
        mask[row, 20 - len(sequence) :] = 1
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    batched = logits(model, ids, attention_mask=mask, position_ids=positions)
    for row, sequence in enumerate(sequences):
        expected = logits(model, sequence[None])[0]
        torch.testing.assert_close(batched[row, 20 - len(sequence) :], expected, **CLOSE)
    generated = generate(model, ids, attention_mask=mask).sequences
    for row, sequence in enumerate(sequences):
        alone = generate(model, sequence[None]).sequences[0, len(sequence) :]
        assert generated[row, 20:].tolist() == alone.tolist()


def test_bytes_are_the_plans(model: Any, plan: Plan, prompt: Tensor) -> None:
    cache = LatentCache(2)
    logits(model, prompt, past_key_values=cache)
    for tokens in range(21, 20 + 3 * BLOCK):
        logits(model, prompt[:, :1], past_key_values=cache)
        planned = plan.cache_bytes(tokens, "float32") * 3
        block = plan.cache_bytes(BLOCK, "float32") * 3
        assert cache.nbytes() == planned
        assert planned <= cache.nbytes_allocated() <= 1.25 * planned + block
    assert cache.get_seq_length() == 19 + 3 * BLOCK
    for layer in cache.layers:
        assert layer.values.shape[-1] == 8
        assert layer.values.shape[1] == model.config.base_kv_heads


def test_generate_fills_our_cache(model: Any, plan: Plan, prompt: Tensor) -> None:
    cache = generate(model, prompt).past_key_values
    assert isinstance(cache, LatentCache)
    assert cache.get_seq_length() == 27
    assert cache.nbytes() == 3 * plan.cache_bytes(27, "float32")


# Ways to generate; without a cache there is nothing that could go wrong with it.


def test_greedy(model: Any, prompt: Tensor) -> None:
    expected = generate(model, prompt, use_cache=False).sequences
    assert torch.equal(generate(model, prompt).sequences, expected)


def test_sampling_follows_its_seed(model: Any, prompt: Tensor) -> None:
    drawn = []
    for cached in (True, False, True):
        torch.manual_seed(3)
        drawn.append(generate(model, prompt, do_sample=True, use_cache=cached).sequences)
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], drawn[2])


def test_beams(model: Any, prompt: Tensor) -> None:
    beams = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 12}
    expected = generate(model, prompt, use_cache=False, **beams).sequences
    assert torch.equal(generate(model, prompt, **beams).sequences, expected)


def test_several_sequences_of_one_prompt(model: Any, prompt: Tensor) -> None:
    drawn = []
    for cached in (True, False):
        torch.manual_seed(4)
        many = generate(model, prompt, do_sample=True, num_return_sequences=3, use_cache=cached)
        drawn.append(many.sequences)
    assert drawn[0].shape[0] == 9
    assert torch.equal(drawn[0], drawn[1])


def test_prompt_lookup(model: Any, prompt: Tensor) -> None:
    ids = torch.cat((prompt[:1], prompt[:1]), dim=1)
    expected = generate(model, ids, max_new_tokens=20).sequences
    looked_up = generate(model, ids, max_new_tokens=20, prompt_lookup_num_tokens=4)
    assert torch.equal(looked_up.sequences, expected)
    assert isinstance(looked_up.past_key_values, LatentCache)


def test_assisted(base: Base, model: Any, prompt: Tensor) -> None:
    expected = generate(model, prompt[:1], max_new_tokens=20).sequences
    helped = generate(model, prompt[:1], max_new_tokens=20, assistant_model=base.model)
    assert torch.equal(helped.sequences, expected)
    expected = generate(base.model, prompt[:1], max_new_tokens=20).sequences
    helped = generate(base.model, prompt[:1], max_new_tokens=20, assistant_model=model)
    assert torch.equal(helped.sequences, expected)


def test_cropped_cache_goes_on(model: Any, token_windows: Tensor) -> None:
    ids, other = token_windows[:1], token_windows[1:2]
    cache = LatentCache(2)
    logits(model, ids[:, :30], past_key_values=cache)
    logits(model, other[:, :20], past_key_values=cache)
    cache.crop(-20)
    assert cache.get_seq_length() == 30
    last = logits(model, ids[:, 30:], past_key_values=cache)
    torch.testing.assert_close(last, logits(model, ids)[:, 30:], **CLOSE)


def test_repeated_selected_and_reset_cache(model: Any, token_windows: Tensor) -> None:
    ids = token_windows[:2]
    expected = logits(model, ids)[:, 30:]
    cache = LatentCache(2)
    logits(model, ids[:, :30], past_key_values=cache)
    cache.batch_repeat_interleave(2)
    both = logits(model, ids[:, 30:].repeat_interleave(2, dim=0), past_key_values=cache)
    torch.testing.assert_close(both, expected.repeat_interleave(2, dim=0), **CLOSE)
    cache.crop(-34)
    cache.batch_select_indices(torch.tensor([3, 0]))
    swapped = logits(model, ids[:, 30:].flip(0), past_key_values=cache)
    torch.testing.assert_close(swapped, expected.flip(0), **CLOSE)
    cache.reset()
    assert cache.nbytes() == cache.nbytes_allocated() == cache.get_seq_length() == 0
    torch.testing.assert_close(logits(model, ids, past_key_values=cache)[:, 30:], expected, **CLOSE)


# Training, and the rotary table.


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_gives_finite_gradients(
    base: Base, plan: Plan, statistics: Statistics, token_windows: Tensor, checkpointing: bool
) -> None:
    model = rewrite(base, plan, statistics)
    if checkpointing:
        model.gradient_checkpointing_enable()
    model.train()
    loss = model(token_windows[:2], labels=token_windows[:2]).loss
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, [model.get_parameter(name) for name in names])
    assert len(names) == len(list(model.parameters()))
    for name, gradient in zip(names, gradients, strict=True):
        assert torch.isfinite(gradient).all(), name
        assert gradient.abs().max() > 0, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_frequencies_survive_loading_and_casting(
    model: Any, base: Base, tmp_path: Any, dtype: torch.dtype
) -> None:
    expected = torch.tensor(base.family.rotary(base.config)[0])
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=dtype)
    made = type(model)._from_config(model.config, dtype=dtype)

    def check(changed: Any) -> None:
        (found,) = [b for n, b in changed.named_buffers() if n.endswith("inv_freq")]
        assert found.dtype == torch.float32
        assert torch.equal(found, expected)

    check(made)
    check(loaded)
    for other in (torch.bfloat16, torch.float32, torch.float16):
        check(loaded.to(other))


def test_filled_from_meta(model: Any, base: Base, plan: Plan, token_windows: Tensor) -> None:
    empty = base.family.compressed_on_meta(base.config, plan)
    empty.to_empty(device="cpu")
    empty.load_state_dict(model.state_dict())
    torch.testing.assert_close(
        logits(empty.eval(), token_windows[:1]), logits(model, token_windows[:1]), **CLOSE
    )


def test_bfloat16_runs_close_to_float32(
    base: Base, plan: Plan, statistics: Statistics, token_windows: Tensor
) -> None:
    model = rewrite(base, plan, statistics)
    expected = logits(model, token_windows[:2])
    half = {name: t.to(torch.bfloat16) for name, t in model.state_dict().items()}
    low = type(model)(model.config).to(torch.bfloat16).eval()
    low.load_state_dict(half)
    low.tie_weights()
    close = nn.functional.cosine_similarity(
        logits(low, token_windows[:2]).float().flatten(), expected.flatten(), dim=0
    )
    assert close > 0.99


def test_what_engines_read(base: Base, plan: Plan, model: Any) -> None:
    config = model.config
    assert config.head_dim == base.shape.head_dim
    assert config.v_head_dim == 8
    assert config.num_key_value_heads == base.shape.kv_heads
    assert config.base_model_tp_plan
    for attention in base.family.attention_modules(model):
        assert attention.scaling == base.shape.head_dim**-0.5
        assert isinstance(attention.scaling, float)
    for pattern in config.base_model_tp_plan:
        name = pattern.replace("*", "0")
        model.base_model.get_submodule(name)
