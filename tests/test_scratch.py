"""Models from scratch: what they are, where they begin, and what each phase trains."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPTNeoXForCausalLM

from vdcompress.cache_size import measure_cache
from vdcompress.errors import PlanError, RecipeError
from vdcompress.evaluate import evaluate_windows
from vdcompress.events import EpochEnded, Event, StageEnded
from vdcompress.heal import HealSettings
from vdcompress.modeling.gpt_neox import VDGPTNeoXConfig, VDGPTNeoXForCausalLM
from vdcompress.pipeline.scratch_settings import Scratch
from vdcompress.recipe import HealSection, Recipe, load_recipe
from vdcompress.scratch.phases import train_phases

COMPRESSED, WHOLE = "seed-vdproj", "seed-baseline"
RESTORING, TWO_PHASES = "seed-restore-e2e", "seed-restore-2phase"
SEEDS = (COMPRESSED, WHOLE, RESTORING, TWO_PHASES)
TINY = {
    "scratch.vocab_size": 64,
    "scratch.hidden_size": 32,
    "scratch.num_hidden_layers": 2,
    "scratch.num_attention_heads": 4,
    "scratch.rotary_pct": 0.5,
    "scratch.intermediate_size": 48,
    "scratch.max_position_embeddings": 256,
}
PLAIN = HealSettings(epochs=2, batch_size=4, learning_rate=3e-3, distill=False, train="all")


def tiny(name: str, **more: Any) -> Scratch:
    recipe = load_recipe(name)
    narrow = {"plan.v_dim": 20} if recipe.plan.v_dim else {}
    if recipe.scratch and recipe.scratch.restore_from:
        narrow = {"scratch.restore_from": 20}
    return Scratch.of(recipe.merged(TINY | narrow | more))


def shaken(scratch: Scratch) -> Any:
    """Return a model in float64 whose biases and norms are random too."""
    model = scratch.model().double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator).double())
    return model


def windows(seed: int, count: int = 16, length: int = 24) -> Tensor:
    """Return sequences in which one token all but decides the next."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randint(1, 3, (count, length), generator=generator)
    return (torch.randint(0, 64, (count, 1), generator=generator) + 5 * steps.cumsum(1)) % 64


class Interrupt:
    """A listener that interrupts when so many epochs have ended, of all phases together."""

    def __init__(self, epochs: int) -> None:
        self.left = epochs

    def __call__(self, event: Event) -> None:
        self.left -= isinstance(event, EpochEnded)
        if not self.left:
            raise KeyboardInterrupt


def test_the_original_has_as_many_parameters_as_it_said() -> None:
    counts = Scratch.of(load_recipe(COMPRESSED)).counts()
    assert counts["compressed"] == 69_239_680
    assert counts["v_path"] == 6 * (512 * 320 + 320 + 320 * 512 + 512) == 1_971_072


@pytest.mark.parametrize("name", SEEDS)
def test_all_four_differ_in_the_path_of_values_alone(name: str) -> None:
    scratch = Scratch.of(load_recipe(name))
    with torch.device("meta"):
        pythia = GPTNeoXForCausalLM(replace(scratch.architecture, qk_bias=True).config())
    biases_of_q_and_k = 6 * 2 * 512
    whole = sum(p.numel() for p in pythia.parameters()) - biases_of_q_and_k
    counts = scratch.counts()
    assert counts["base"] == whole == 70_420_480
    paths = {
        COMPRESSED: 6 * (512 * 320 + 320 + 320 * 512 + 512),
        WHOLE: 6 * 2 * (512 * 512 + 512),
        RESTORING: 6 * (512 * 320 + 320 + 320 * 512 + 512 + 512 * 512 + 512),
    }
    paths[TWO_PHASES] = paths[RESTORING]
    assert counts["v_path"] == paths[name]
    assert counts["compressed"] == whole - paths[WHOLE] + paths[name]
    assert scratch.plan.reduction == (0.1875 if name == COMPRESSED else 0.0)


@pytest.mark.parametrize("name", SEEDS)
def test_the_recipes_train_as_the_original_did(name: str) -> None:
    recipe = load_recipe(name)
    assert (recipe.heal.samples, recipe.heal.seq_len) == (10_000, 128)
    last = Scratch.of(recipe).phases[-1]
    assert (last.batch_size, last.learning_rate, last.schedule) == (8, 1e-4, "constant")
    assert (last.epochs, last.patience, last.train) == (30, 1, "all")
    assert not last.distill


@pytest.mark.parametrize("name", SEEDS)
def test_the_recipes_lean_on_no_default_of_finetune(name: str) -> None:
    said = load_recipe(name).heal.model_fields_set
    of_the_base = {"kl_weight", "ce_weight", "hidden_weight", "temperature", "target"}
    of_the_base |= {"teacher_top_k"}
    of_the_machine = {"micro_batch", "gradient_checkpointing", "save_steps", "report_to"}
    of_the_user = {"data", "seed", "max_steps"}
    assert set(HealSection.model_fields) - said == of_the_base | of_the_machine | of_the_user


@pytest.mark.parametrize("name", SEEDS)
def test_every_group_learns_at_the_one_rate(name: str) -> None:
    for phase in Scratch.of(load_recipe(name)).phases:
        rates = (phase.latents_rate, phase.attention_rate, phase.body_rate, phase.embeddings_rate)
        assert rates == (1.0,) * 4
        assert phase.hidden == 0.0


def packed(model: Any, scratch: Scratch) -> GPTNeoXForCausalLM:
    """Return transformers' model with the same weights, products of two maps multiplied out."""
    config = replace(scratch.architecture, qk_bias=True, restore_from=None).config()
    reference = GPTNeoXForCausalLM(config).double().eval()
    state = dict(model.state_dict())
    heads, hidden = config.num_attention_heads, config.hidden_size
    for layer in range(config.num_hidden_layers):
        prefix = f"gpt_neox.layers.{layer}.attention."
        q, k = (state.pop(f"{prefix}{side}_proj.weight") for side in "qk")
        if scratch.architecture.restore_from:
            one, two = (f"{prefix}v_compress.{part}." for part in ("compress", "restore"))
            first, shift = state.pop(f"{one}weight"), state.pop(f"{one}bias")
            second, bias = state.pop(f"{two}weight"), state.pop(f"{two}bias")
            v, v_bias = second @ first, second @ shift + bias
        else:
            v, v_bias = (state.pop(f"{prefix}v_compress.{part}") for part in ("weight", "bias"))
        rows = torch.stack([x.view(heads, -1, hidden) for x in (q, k, v)], dim=1)
        none = torch.zeros_like(v_bias)
        biases = torch.stack([x.view(heads, -1) for x in (none, none, v_bias)], dim=1)
        state[f"{prefix}query_key_value.weight"] = rows.reshape(-1, hidden)
        state[f"{prefix}query_key_value.bias"] = biases.reshape(-1)
    reference.load_state_dict(state, strict=True)
    return reference


@pytest.mark.parametrize("name", [WHOLE, RESTORING])
def test_full_width_architectures_are_gpt_neox(name: str) -> None:
    scratch = tiny(name)
    model, ids = shaken(scratch), windows(3)
    with torch.no_grad():
        ours, theirs = model(ids).logits, packed(model, scratch)(ids).logits
    torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("name", SEEDS)
def test_the_cache_is_as_large_as_the_plan_says(name: str) -> None:
    scratch = tiny(name)
    found = measure_cache(scratch.model(), windows(3)[0])
    assert found.bytes_per_token == scratch.plan.bytes_per_token
    assert (found.bytes_per_token == scratch.plan.base_bytes_per_token) == (name != COMPRESSED)


def test_the_compressed_one_is_our_class_with_the_numbers_of_the_recipe() -> None:
    scratch = tiny(COMPRESSED)
    model = scratch.model()
    part = {"groups": 4, "width": 4}
    layout = {
        "v": {"groups": 4, "width": 5},
        "k_nope": part,
        "k_rotary": part | {"frequencies": [0, 1]},
    }
    config = VDGPTNeoXConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        kv_layout=[layout] * 2,
        inv_freq=[1.0, 0.01],
        softmax_scale=8**-0.5,
        base_head_dim=8,
        base_kv_heads=4,
        projection_bias={"q": False, "k": False, "v": True, "o": True},
    )
    plain = VDGPTNeoXForCausalLM(config).eval()
    plain.load_state_dict(model.state_dict(), strict=True)
    assert type(model) is VDGPTNeoXForCausalLM
    with torch.no_grad():
        torch.testing.assert_close(model(windows(3)).logits, plain(windows(3)).logits)


def test_weights_begin_as_transformers_draws_them() -> None:
    before = torch.random.get_rng_state()
    model: Any = tiny(RESTORING).model()
    assert torch.equal(torch.random.get_rng_state(), before)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any(), name
        elif "norm" in name:
            assert bool((parameter == 1).all()), name
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.15), name
            assert abs(parameter.mean().item()) < 0.003, name


def test_what_architectures_share_begins_alike() -> None:
    states = [dict(tiny(name).model().state_dict()) for name in SEEDS]
    first, whole, restoring, two_phases = states
    differ = {
        name.removeprefix("gpt_neox.layers.0.attention.")
        for name, value in whole.items()
        if not torch.equal(value, first[name]) and ".1." not in name
    }
    assert differ == {"v_compress.weight", "v_compress.bias", "dense.weight"}
    assert all(torch.equal(value, two_phases[name]) for name, value in restoring.items())
    alike = {name for name in whole if "v_compress" not in name}
    assert all(torch.equal(whole[name], restoring[name]) for name in alike)
    other = tiny(COMPRESSED, **{"scratch.seed": 1}).model().state_dict()
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


def test_two_phases_train_what_they_say(tmp_path: Path) -> None:
    scratch = tiny(TWO_PHASES, **{"heal.learning_rate": 3e-3, "heal.epochs": 2})
    assert [phase.train for phase in scratch.phases] == ["latents", "all"]
    assert [phase.epochs for phase in scratch.phases] == [2, 2]
    assert [phase.epochs for phase in tiny(TWO_PHASES).phases] == [5, 30]
    model: Any = scratch.model()
    states = [_copy(model)]

    def note(event: Event) -> None:
        if isinstance(event, StageEnded):
            states.append(_copy(model))

    first, second = train_phases(
        model, windows(0), windows(1), scratch.phases, checkpoints=tmp_path, on_event=note
    )
    assert _changed(states[0], states[1]) == {
        f"gpt_neox.layers.{layer}.attention.v_compress.{part}.{kind}"
        for layer in range(2)
        for part in ("compress", "restore")
        for kind in ("weight", "bias")
    }
    assert _changed(states[1], states[2]) == set(dict(model.named_parameters()))
    assert second.initial_val_ppl == pytest.approx(first.best_val_ppl)
    assert second.best_val_ppl < first.best_val_ppl < first.initial_val_ppl
    assert len(second.history) == 2


def test_everything_trains_by_the_text_alone_until_it_gets_no_better(tmp_path: Path) -> None:
    scratch = tiny(COMPRESSED, **{"heal.learning_rate": 1e-2, "heal.batch_size": 4})
    model = scratch.model()
    before, validation = _copy(model), windows(1)
    [healed] = train_phases(
        model, windows(0, count=8), validation, scratch.phases, checkpoints=tmp_path
    )
    assert 1 <= healed.best_epoch == len(healed.history) - 1 < 29
    assert healed.history[-1].val_ppl >= healed.best_val_ppl
    assert healed.best_val_ppl == pytest.approx(healed.history[-2].val_ppl)
    measured = evaluate_windows(model, validation)
    assert measured.perplexity == pytest.approx(healed.best_val_ppl, rel=1e-5)
    assert _changed(before, _copy(model)) == set(before)


@pytest.mark.parametrize("phase", [0, 1])
def test_interrupted_in_any_phase_and_resumed_is_never_interrupted(
    tmp_path: Path, phase: int
) -> None:
    scratch = tiny(TWO_PHASES)
    phases = (replace(PLAIN, train="latents"), PLAIN)

    def train(folder: str, **more: Any) -> tuple[Any, dict[str, Tensor]]:
        model = scratch.model()
        healed = train_phases(
            model, windows(0), windows(1), phases, checkpoints=tmp_path / folder, **more
        )
        return [one.history for one in healed], _copy(model)

    straight = train("straight")
    with pytest.raises(KeyboardInterrupt):
        train("killed", on_event=Interrupt(2 + 2 * phase))
    assert (tmp_path / "killed" / "phase-2").exists() == bool(phase)
    resumed = train("killed", resume=True)
    assert resumed[0] == straight[0]
    assert all(torch.equal(value, straight[1][name]) for name, value in resumed[1].items())


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"heal.distill": True}, RecipeError, "there is no base to learn from"),
        ({"scratch.hidden_size": 30}, RecipeError, "30 is not divisible by 4 heads"),
        ({"scratch.rotary_pct": 0.125}, RecipeError, "is odd"),
        ({"scratch.restore_from": 32}, RecipeError, "restore_from 32 is not between 0 and 32"),
        ({"scratch.restore_from": 16}, RecipeError, "exclude each other"),
        ({"plan.v_dim": 22}, PlanError, "not divisible by 4"),
        ({"plan.allocation": "layers"}, RecipeError, "no activations to choose by"),
        ({"heal.seq_len": 512}, RecipeError, "heal.seq_len 512 is above"),
        ({"model": "demo"}, RecipeError, "a model beside scratch"),
    ],
)
def test_what_cannot_be_built_or_trained_is_said(
    changes: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        tiny(COMPRESSED, **changes)


def test_a_recipe_without_scratch_has_no_model_from_scratch() -> None:
    with pytest.raises(RecipeError, match="no scratch section"):
        Scratch.of(Recipe())


def _copy(model: Any) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def _changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name, value in before.items() if not torch.equal(value, after[name])}
