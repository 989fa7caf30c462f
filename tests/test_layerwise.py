"""A model run layer by layer is the model: hidden states, statistics, losses; and nothing stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vdcompress.artifact import Compressed, write_artifact
from vdcompress.errors import DataError, ModelError, UsageError
from vdcompress.evaluate import evaluate
from vdcompress.evaluate_layerwise import evaluate_stacks
from vdcompress.layerwise import HiddenStates, Stack, calibrate_layers
from vdcompress.load import Base
from vdcompress.plan import make_plan
from vdcompress.rewrite import rewrite
from vdcompress.rewrite_layerwise import base_stack, compressed_stack
from vdcompress.statistics import Moments, Statistics

CLOSE = {"rtol": 1e-5, "atol": 1e-6}
NEEDS = frozenset({"values", "outputs"})


@pytest.fixture(params=["memory", "file"])
def states_in(request: Any, tmp_path: Path) -> Path | None:
    return tmp_path if request.param == "file" else None


def hidden_of(stack: Stack, windows: Tensor, folder: Path | None = None) -> HiddenStates:
    return HiddenStates(len(windows), windows.shape[1], stack.width, folder)


def on_meta(stack: Stack) -> bool:
    return all(tensor.is_meta for tensor in stack.model.state_dict().values())


def test_hidden_states_are_the_models(
    base: Base, token_windows: Tensor, states_in: Path | None
) -> None:
    stack = base_stack(base)
    hidden = hidden_of(stack, token_windows, states_in)
    stack.embed(token_windows, hidden)
    done = []
    for index in range(len(stack)):
        with stack.layer(index):
            done = list(stack.run(hidden))
    stack.finish(hidden)
    assert done[-1] == len(token_windows)
    with torch.no_grad():
        expected = base.model.base_model(token_windows, use_cache=False).last_hidden_state
    torch.testing.assert_close(hidden.read(0, len(token_windows)), expected, **CLOSE)
    assert on_meta(stack)


def test_a_stack_holds_one_layer_at_a_time(base: Base) -> None:
    stack = base_stack(base)
    assert on_meta(stack)
    for index in range(len(stack)):
        with stack.layer(index) as layer:
            held = {n for n, t in stack.model.state_dict().items() if not t.is_meta}
            assert {id(p) for p in layer.parameters()} >= {
                id(p) for p in stack.model.parameters() if not p.is_meta
            }
            prefix = f"{base.family.layers_prefix()}.0."
            assert held == {prefix + name for name in layer.state_dict()}
            (attention,) = base.family.attention_modules(stack.model)
            stack.forget_all_but(attention)
            held = {n for n, t in stack.model.state_dict().items() if not t.is_meta}
            prefix = base.family.parameter_prefix(0)
            assert held == {prefix + name for name in attention.state_dict()}
        assert on_meta(stack)


def test_a_layer_is_forgotten_after_an_exception(base: Base, token_windows: Tensor) -> None:
    stack = base_stack(base)
    names = [name for name, _ in stack.model.named_modules()]
    with pytest.raises(KeyboardInterrupt), stack.layer(1):
        raise KeyboardInterrupt
    assert on_meta(stack)
    assert [name for name, _ in stack.model.named_modules()] == names


def test_statistics_are_those_of_the_whole_model(
    base: Base, token_windows: Tensor, statistics: Statistics, states_in: Path | None
) -> None:
    stack = base_stack(base)
    hidden = hidden_of(stack, token_windows, states_in)
    stack.embed(token_windows, hidden)
    indices = []
    for layer in calibrate_layers(stack, base.family, hidden, NEEDS):
        indices.append(layer.index)
        expected = base.family.attention_modules(base.model)[layer.index].state_dict()
        for name, tensor in layer.attention.state_dict().items():
            assert torch.equal(tensor, expected[name])
        known = vars(statistics.layers[layer.index])
        for name in NEEDS:
            same_moments(getattr(layer.statistics, name), known[name])
    assert indices == list(range(base.shape.layers))


def test_a_layer_that_is_run_twice_is_advanced_once(base: Base, token_windows: Tensor) -> None:
    stack = base_stack(base)
    once, twice = hidden_of(stack, token_windows), hidden_of(stack, token_windows)
    for hidden in (once, twice):
        stack.embed(token_windows, hidden)
    before = twice.read(0, 16).clone()
    list(calibrate_layers(stack, base.family, once, NEEDS))
    for layer in calibrate_layers(stack, base.family, twice, NEEDS, twice={1}):
        if layer.index == 1:
            assert not torch.equal(twice.read(0, 16), before)
            between = twice.read(0, 16).clone()
            stack.recall()
            list(stack.run(twice, advance=False))
            assert torch.equal(twice.read(0, 16), between)
            list(stack.run(twice))
    assert torch.equal(twice.read(0, 16), once.read(0, 16))


def same_moments(found: Moments, expected: Moments) -> None:
    assert found.count == expected.count
    for ours, theirs in ((found.mean, expected.mean), (found.covariance, expected.covariance)):
        scale = float(theirs.abs().max())
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6 * scale)


def test_hooks_are_gone_and_weights_too(base: Base, token_windows: Tensor) -> None:
    stack = base_stack(base)
    hidden = hidden_of(stack, token_windows)
    stack.embed(token_windows, hidden)
    layers = calibrate_layers(stack, base.family, hidden, NEEDS)
    next(layers)
    layers.close()
    assert on_meta(stack)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in stack.model.modules())


def test_what_overflows_is_named(base: Base, token_windows: Tensor) -> None:
    stack = base_stack(base)
    hidden = hidden_of(stack, token_windows)
    stack.embed(token_windows, hidden)
    hidden.write(3, torch.full((1, *hidden.shape[1:]), torch.nan))
    with pytest.raises(ModelError, match="NaN or infinity") as caught:
        list(calibrate_layers(stack, base.family, hidden, NEEDS))
    assert base.family.parameter_prefix(0).rstrip(".") in caught.value.message


def test_tokens_of_another_vocabulary(base: Base) -> None:
    stack = base_stack(base)
    windows = torch.full((1, 4), 264)
    with pytest.raises(ModelError, match="token 264 is not of the model's vocabulary of 264"):
        stack.embed(windows, hidden_of(stack, windows))


@pytest.mark.parametrize("tokens", [1025, 1000], ids=["full", "shorter last window"])
@pytest.mark.parametrize("block", [50, 4096])
def test_the_evaluation_is_the_whole_models(
    base: Base,
    statistics: Statistics,
    token_windows: Tensor,
    tmp_path: Path,
    tokens: int,
    block: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("vdcompress.evaluate_layerwise.VOCABULARY_BLOCK", block)
    monkeypatch.setattr("vdcompress.evaluate_layerwise.TOKENS", 300)
    plan = make_plan(base.shape, v_dim=8 * base.shape.kv_heads)
    model = rewrite(base, plan, statistics)
    write_artifact(tmp_path / "run", Compressed.of(base, plan, model))
    text = token_windows.flatten().repeat(2)[:tokens]
    settings: dict[str, Any] = {"window": 128, "windows": 8, "positions": (0, 16, 100, 400)}
    expected = evaluate(model, text, base=base.model, **settings)
    stacks = compressed_stack(base, plan, tmp_path / "run"), base_stack(base)
    found = evaluate_stacks(*stacks, text, **settings)
    assert (found.tokens, found.window) == (expected.tokens, expected.window) == (tokens - 1, 128)
    for name in ("perplexity", "base_perplexity", "ratio"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-5)
    assert found.kl == pytest.approx(expected.kl, rel=1e-3, abs=1e-6)
    for ours, theirs in zip(found.positions, expected.positions, strict=True):
        assert (ours.start, ours.stop) == (theirs.start, theirs.stop)
        assert ours.base == pytest.approx(theirs.base, rel=1e-5)
        assert ours.compressed == pytest.approx(theirs.compressed, rel=1e-5)


def test_the_evaluation_refuses_what_evaluate_refuses(base: Base, token_windows: Tensor) -> None:
    stack = base_stack(base)
    with pytest.raises(DataError, match="too short"):
        evaluate_stacks(stack, stack, token_windows[0], window=64)
    with pytest.raises(UsageError, match="increasing"):
        evaluate_stacks(stack, stack, token_windows.flatten(), window=64, positions=(5, 3))


def test_tied_and_older_checkpoints(tiny_llama: Path, tiny_neox: Path) -> None:
    from vdcompress.load import fetch, load

    windows = torch.arange(64).reshape(2, 32)
    for folder in (tiny_llama, tiny_neox):
        stack, model = base_stack(fetch(folder)), load(folder).model
        hidden = hidden_of(stack, windows)
        stack.embed(windows, hidden)
        for index in range(len(stack)):
            with stack.layer(index):
                list(stack.run(hidden))
        stack.finish(hidden)
        head = torch.cat([block for _, block in stack.head_blocks(100)])
        assert head.dtype == torch.float32
        with torch.no_grad():
            expected = model(windows).logits
        torch.testing.assert_close(hidden.read(0, 2) @ head.T, expected, **CLOSE)


def test_a_checkpoint_of_another_model(base: Base, tmp_path: Path) -> None:
    from dataclasses import replace

    state = load_file(base.folder / "model.safetensors")
    name = next(name for name in state if name.endswith("layernorm.weight"))
    state[name] = torch.ones(65)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"has shape \[65\], not \[64\]"):
        base_stack(replace(base, folder=tmp_path))
    del state[name]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="lack 1 tensors"):
        base_stack(replace(base, folder=tmp_path))


def test_hidden_states_in_a_file_leave_nothing(tmp_path: Path) -> None:
    with HiddenStates(3, 4, 5, tmp_path) as hidden:
        hidden.write(1, torch.ones(2, 4, 5))
        assert torch.equal(hidden.read(1, 9), torch.ones(2, 4, 5))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="closed"):
        hidden.read(0, 1)
