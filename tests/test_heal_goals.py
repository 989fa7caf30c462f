"""Healing end to end towards each of its goals, in float32 and in bfloat16."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vdcompress.events import EpochEnded, Event, OnEvent, Progress, StageStarted, ignore
from vdcompress.heal import TOP_K, HealSettings, heal
from vdcompress.healing.hidden_states import hidden_state_error
from vdcompress.healing.layerwise import layerwise_error
from vdcompress.load import Base
from vdcompress.plan import make_plan
from vdcompress.rewrite import rewrite
from vdcompress.statistics import Statistics

SHORT = HealSettings(epochs=4, patience=4, batch_size=4, learning_rate=1e-2, train="latents")
GOALS = {
    "default": replace(SHORT, train=HealSettings.train, bf16=False),
    "hidden": replace(SHORT, kl_weight=0.0, hidden_weight=1.0, gradient_checkpointing=True),
    "layers": replace(SHORT, target="layers", bf16=True),
    "top": replace(SHORT, teacher_top_k=16, bf16=True),
}


@pytest.fixture(scope="module")
def compressed(base: Base, statistics: Statistics) -> Any:
    """Return a compressed model whose latents were damaged as well."""
    model = rewrite(base, make_plan(base.shape, v_dim=8 * base.shape.kv_heads), statistics)
    model = copy.deepcopy(model)
    draw = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "v_compress" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=draw))
    return model


@pytest.fixture(scope="module")
def windows(base: Base) -> Tensor:
    """Return token ids [13, 24] that the teacher wrote."""
    begins = torch.arange(1, 14)[:, None]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return base.model.generate(
            begins, max_new_tokens=23, min_new_tokens=23, do_sample=True, pad_token_id=0
        )


def divergence(student: Any, teacher: Any, windows: Tensor) -> float:
    with torch.no_grad():
        q, p = (model(windows[:, :-1]).logits.log_softmax(-1) for model in (student, teacher))
    return torch.nn.functional.kl_div(q, p, log_target=True, reduction="sum").item()


def hidden_error(student: Any, teacher: Any, windows: Tensor) -> float:
    with torch.no_grad():
        ours, theirs = (
            model.base_model(windows, output_hidden_states=True, use_cache=False).hidden_states
            for model in (student, teacher)
        )
        return hidden_state_error(ours[1:], theirs[1:]).item()


def layer_error(student: Any, teacher: Any, windows: Tensor) -> float:
    with torch.no_grad():
        return layerwise_error(student, teacher, windows).item()


@pytest.mark.parametrize("goal", GOALS)
def test_healing_comes_nearer_to_each_goal(
    goal: str, compressed: Any, base: Base, windows: Tensor, tmp_path: Path
) -> None:
    student, teacher = copy.deepcopy(compressed), base.model
    error = {"hidden": hidden_error, "layers": layer_error}.get(goal, divergence)
    before = error(student, teacher, windows)
    known = copy.deepcopy(teacher.state_dict())
    events: list[Event] = []

    healed = heal(
        student,
        teacher,
        windows,
        windows,
        GOALS[goal],
        checkpoints=tmp_path / "heal",
        on_event=events.append,
    )

    assert healed.tokens_seen == 4 * 12 * 23
    assert len(healed.history) == 4
    assert healed.best_epoch > 0
    assert error(student, teacher, windows) < 0.8 * before
    assert all(torch.equal(known[name], value) for name, value in teacher.state_dict().items())
    kept = goal == "top"
    assert (StageStarted("teacher", 13) in events) == kept
    assert (tmp_path / "heal" / TOP_K).exists() == kept


@pytest.mark.parametrize("stage", ["teacher", "finetune"])
def test_a_run_with_kept_masses_that_is_killed_goes_on(
    stage: str, compressed: Any, base: Base, windows: Tensor, tmp_path: Path
) -> None:
    settings = replace(GOALS["top"], epochs=2, save_steps=1, bf16=False)

    def healed(folder: str, *, resume: bool = False, on_event: OnEvent = ignore) -> Any:
        student, path = copy.deepcopy(compressed), tmp_path / folder
        given = (student, base.model, windows, windows, settings)
        heal(*given, checkpoints=path, resume=resume, on_event=on_event)
        return student

    def interrupt(event: Event) -> None:
        if isinstance(event, Progress) and event.stage == stage and event.done:
            raise KeyboardInterrupt
        if isinstance(event, EpochEnded):
            raise KeyboardInterrupt

    known = healed("whole")
    with pytest.raises(KeyboardInterrupt):
        healed("cut", on_event=interrupt)
    found = healed("cut", resume=True)

    for name, value in known.state_dict().items():
        assert torch.equal(found.state_dict()[name], value)
