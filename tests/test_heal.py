"""Healing: the loss against a plain one, exact resumption, and what may go wrong."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from vdcompress.errors import DataError, ModelError, RunError, UsageError
from vdcompress.events import EpochEnded, Event, Progress, Warned, ignore
from vdcompress.heal import Healed, HealSettings, heal
from vdcompress.healing import checkpoints, trainer
from vdcompress.healing.divergence import Objective
from vdcompress.healing.objective import cross_entropy, losses
from vdcompress.healing.parameters import own_parameters, trained_names

VOCABULARY = 53
SHORT = HealSettings(epochs=3, batch_size=4, learning_rate=3e-3, save_steps=3, chunk_tokens=40)


def random_model(seed: int, dropout: float = 0.0) -> GPTNeoXForCausalLM:
    config = GPTNeoXConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=64,
        hidden_dropout=dropout,
        attention_dropout=dropout,
    )
    torch.manual_seed(seed)
    model = GPTNeoXForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        model.get_output_embeddings().weight.mul_(4)
    return model


def pair(
    dropout: float = 0.0, damage: float = 0.15
) -> tuple[GPTNeoXForCausalLM, GPTNeoXForCausalLM]:
    """Return a student with damaged attention and its teacher; the rest they share."""
    teacher = random_model(0, dropout)
    student = random_model(0, dropout)
    for name, parameter in student.named_parameters():
        parameter.data = teacher.get_parameter(name).data
        if ".attention." in name:
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(5))
            parameter.data = parameter.data + damage * noise
    return student, teacher


@pytest.fixture(scope="module")
def text() -> tuple[Tensor, Tensor]:
    """Return training windows [32, 12] and validation windows [20, 12] that the teacher wrote."""
    torch.manual_seed(1)
    begins = torch.randint(1, VOCABULARY, (52, 1))
    written = random_model(0).generate(
        begins, max_new_tokens=11, min_new_tokens=11, do_sample=True, pad_token_id=0
    )
    return written[:32], written[32:]


def weights(model: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one.keys() | other.keys())


class Stop:
    """A listener that interrupts once a condition holds, as Ctrl-C would."""

    def __init__(self, when: Callable[[Event], bool]) -> None:
        self.when = when

    def __call__(self, event: Event) -> None:
        if self.when(event):
            raise KeyboardInterrupt


def at_step(step: int) -> Stop:
    return Stop(lambda event: isinstance(event, Progress) and event.done == step)


# The loss


def plain_losses(student: Any, teacher: Any, windows: Tensor, goal: Objective) -> Tensor:
    logits = student(windows[:, :-1]).logits
    kl = F_kl(logits, teacher(windows[:, :-1]).logits.detach(), goal.temperature)
    ce = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), windows[:, 1:].flatten(), reduction="sum"
    )
    return goal.kl * kl + goal.ce * ce


def F_kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:  # noqa: N802
    p, q = (teacher / temperature).softmax(-1), (student / temperature).softmax(-1)
    return temperature**2 * (p * (p.log() - q.log())).sum()


@pytest.mark.parametrize("chunk", [7, 33, 44, 1000])
@pytest.mark.parametrize(
    ("kl", "ce", "temperature"), [(1.0, 0.0, 1.0), (0.0, 1.0, 1.0), (0.7, 0.4, 2.0)]
)
def test_the_loss_and_its_gradient_agree_with_a_plain_one(
    chunk: int, kl: float, ce: float, temperature: float, text: tuple[Tensor, Tensor]
) -> None:
    student, teacher = random_model(3).double(), random_model(0).double()
    goal = Objective(kl, ce, temperature, chunk)
    windows = text[0][:4]
    plain = plain_losses(student, teacher, windows, goal)
    expected = torch.autograd.grad(plain, list(student.parameters()))

    found = losses(student, teacher, windows, goal)
    gradients = torch.autograd.grad(found.objective, list(student.parameters()))

    assert found.tokens == 44
    assert found.objective.item() == pytest.approx(plain.item(), rel=1e-10)
    for gradient, known in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, known, rtol=1e-8, atol=1e-10)
    plain_ce = plain_losses(student, teacher, windows, Objective(0.0, 1.0))
    assert found.cross_entropy.item() == pytest.approx(plain_ce.item(), rel=1e-10)


def test_without_a_teacher_the_loss_is_cross_entropy(text: tuple[Tensor, Tensor]) -> None:
    student = random_model(3).double()

    found = losses(student, None, text[0], Objective(1.0, 1.0, chunk=50))

    assert found.objective.item() == pytest.approx(found.cross_entropy.item())
    mean = cross_entropy(student, text[0], batch=7, chunk=50)
    assert mean == pytest.approx(found.cross_entropy.item() / found.tokens)


# The finetune


def test_distillation_brings_the_student_back(text: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    student, teacher = pair()
    before, taught = weights(student), weights(teacher)
    events: list[Event] = []
    goal = Objective(1.0, 0.0)
    distance = losses(student, teacher, text[1], goal).objective.item()

    healed = heal(student, teacher, *text, SHORT, checkpoints=tmp_path, on_event=events.append)

    assert losses(student, teacher, text[1], goal).objective.item() < 0.7 * distance
    assert healed.best_val_ppl < healed.initial_val_ppl
    loss = cross_entropy(student, text[1], batch=8, chunk=100)
    assert math.exp(loss) == pytest.approx(healed.best_val_ppl, rel=1e-5)
    assert [event for event in events if isinstance(event, EpochEnded)] == list(healed.history)
    assert healed.tokens_seen == len(healed.history) * 32 * 11
    assert equal(weights(teacher), taught)
    changed = {name for name, value in weights(student).items() if not value.equal(before[name])}
    assert changed == set(trained_names(student, "body"))
    assert all(parameter.requires_grad for parameter in student.parameters())
    assert all(parameter.grad is None for parameter in student.parameters())
    assert not student.training


def test_all_parameters_can_be_trained_and_the_teacher_stays(
    text: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    student, teacher = pair()
    before, taught = weights(student), weights(teacher)

    heal(student, teacher, *text, replace(SHORT, train="all", epochs=1), checkpoints=tmp_path)

    assert equal(weights(teacher), taught)
    assert not any(value.equal(before[name]) for name, value in student.named_parameters())


def test_cross_entropy_alone_needs_no_teacher(text: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    student, _ = pair()

    healed = heal(student, None, *text, replace(SHORT, distill=False), checkpoints=tmp_path)

    assert healed.best_val_ppl < healed.initial_val_ppl


def test_train_perplexity_is_that_of_the_text_also_when_distilling(
    text: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    student, teacher = pair()
    expected = math.exp(cross_entropy(student, text[0], batch=4, chunk=100))
    settings = replace(SHORT, epochs=1, learning_rate=1e-30)

    healed = heal(student, teacher, *text, settings, checkpoints=tmp_path)

    assert healed.history[0].train_ppl == pytest.approx(expected, rel=1e-5)


def test_a_finetune_that_never_improves_gives_the_start_back(
    text: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    student, teacher = pair(damage=0.0)
    before = weights(student)
    settings = replace(SHORT, learning_rate=1.0, warmup_ratio=0.0, patience=2, epochs=9)

    healed = heal(student, teacher, *text, settings, checkpoints=tmp_path)

    assert healed.best_epoch == 0
    assert len(healed.history) == 2
    assert not any(epoch.best for epoch in healed.history)
    assert healed.best_val_ppl == healed.initial_val_ppl
    assert equal(weights(student), before)


def test_steps_are_bounded(text: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    student, teacher = pair()
    settings = replace(SHORT, max_steps=10)

    healed = heal(student, teacher, *text, settings, checkpoints=tmp_path)

    assert settings.total_steps(32) == 10
    assert replace(settings, max_steps=None).total_steps(32) == 3 * 8
    assert healed.tokens_seen == (32 + 8) * 11
    assert len(healed.history) == 2


def test_nothing_is_printed(
    text: tuple[Tensor, Tensor], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    student, teacher = pair()
    with pytest.raises(KeyboardInterrupt):
        heal(student, teacher, *text, SHORT, checkpoints=tmp_path, on_event=at_step(10))
    heal(student, teacher, *text, SHORT, checkpoints=tmp_path, resume=True)

    assert capfd.readouterr() == ("", "")


def test_tied_parameters_stay_tied_when_copied() -> None:
    student, teacher = pair()
    shared = teacher.get_output_embeddings().weight
    student.get_output_embeddings().weight = shared
    student.get_input_embeddings().weight = shared

    own_parameters(student, trained_names(student, "all"), teacher)

    tied = student.get_input_embeddings().weight
    assert tied is student.get_output_embeddings().weight
    assert tied is not shared
    assert tied.data_ptr() != shared.data_ptr()
    assert tied.equal(shared)


# Kill and resume


Outcome = tuple[dict[str, Tensor], Healed]


def run_whole(
    text: tuple[Tensor, Tensor], folder: Path, settings: HealSettings, damage: float = 0.15
) -> Outcome:
    student, teacher = pair(0.2, damage)
    healed = heal(student, teacher, *text, settings, checkpoints=folder)
    return weights(student), replace(healed, seconds=0.0)


def run_interrupted(
    text: tuple[Tensor, Tensor],
    folder: Path,
    settings: HealSettings,
    *stops: Stop,
    between: Callable[[Path], None] = ignore,  # type: ignore[assignment]
    damage: float = 0.15,
) -> Outcome:
    for number, stop in enumerate(stops):
        torch.manual_seed(number)  # a new process has another state
        student, teacher = pair(0.2, damage)
        with pytest.raises(KeyboardInterrupt):
            heal(
                student,
                teacher,
                *text,
                settings,
                checkpoints=folder,
                resume=number > 0,
                on_event=stop,
            )
        between(folder)
    torch.manual_seed(99)
    student, teacher = pair(0.2, damage)
    healed = heal(student, teacher, *text, settings, checkpoints=folder, resume=True)
    return weights(student), replace(healed, seconds=0.0)


@pytest.fixture(scope="module")
def straight(text: tuple[Tensor, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """Return the end of a run that nothing interrupted."""
    return run_whole(text, tmp_path_factory.mktemp("straight"), SHORT)


def first_epoch(event: Event) -> bool:
    return isinstance(event, EpochEnded)


STOPS: dict[str, tuple[Stop, ...]] = {
    "within an epoch": (at_step(10),),
    "late in an epoch": (at_step(20),),
    "twice": (at_step(10), at_step(20)),
    "after validation, before its checkpoint": (Stop(first_epoch),),
    "before anything": (Stop(lambda event: True),),
}


@pytest.mark.parametrize("case", STOPS)
def test_killed_and_resumed_is_never_killed(
    case: str, text: tuple[Tensor, Tensor], straight: Outcome, tmp_path: Path
) -> None:
    resumed = run_interrupted(text, tmp_path, SHORT, *STOPS[case])

    assert resumed[1] == straight[1]
    assert equal(resumed[0], straight[0])


def test_that_holds_when_all_parameters_are_trained(
    text: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    settings = replace(SHORT, train="all", epochs=2)
    straight = run_whole(text, tmp_path / "straight", settings)

    resumed = run_interrupted(text, tmp_path / "killed", settings, at_step(10))

    assert resumed[1] == straight[1]
    assert equal(resumed[0], straight[0])


def test_patience_and_the_best_value_survive(text: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    settings = replace(SHORT, learning_rate=1.0, warmup_ratio=0.0, patience=2, epochs=9)
    straight = run_whole(text, tmp_path / "straight", settings, damage=0.0)

    resumed = run_interrupted(text, tmp_path / "killed", settings, at_step(10), damage=0.0)

    assert len(resumed[1].history) == 2
    assert resumed[1] == straight[1]
    assert equal(resumed[0], weights(pair(damage=0.0)[0]))


def test_a_finished_run_is_not_trained_again(text: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    finished = run_whole(text, tmp_path, SHORT)
    kept = sorted(tmp_path.glob("checkpoint-*"))
    assert len(kept) == checkpoints.KEPT
    assert all(map(checkpoints.is_complete, kept))
    events: list[Event] = []
    student, teacher = pair(dropout=0.2)
    body = sum(finished[0][name].numel() for name in trained_names(student, "body"))
    assert (kept[0] / trainer.TRAINED).stat().st_size < 4 * body + 4000

    healed = heal(
        student, teacher, *text, SHORT, checkpoints=tmp_path, resume=True, on_event=events.append
    )

    assert replace(healed, seconds=0.0) == finished[1]
    assert equal(weights(student), finished[0])
    assert events == []


def damaged(how: Callable[[Path], None]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        newest = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
        how(newest)

    return damage


def truncate(checkpoint: Path) -> None:
    os.truncate(checkpoint / "optimizer.pt", 100)


def flip(checkpoint: Path) -> None:
    path = checkpoint / trainer.TRAINED
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def unseal(checkpoint: Path) -> None:
    (checkpoint / checkpoints.SEAL).unlink()


def empty(checkpoint: Path) -> None:
    for path in checkpoint.iterdir():
        path.unlink()


@pytest.mark.parametrize("how", [truncate, flip, unseal, empty])
def test_a_broken_checkpoint_falls_back_to_the_one_before(
    how: Callable[[Path], None], text: tuple[Tensor, Tensor], straight: Outcome, tmp_path: Path
) -> None:
    resumed = run_interrupted(text, tmp_path, SHORT, at_step(20), between=damaged(how))

    assert resumed[1] == straight[1]
    assert equal(resumed[0], straight[0])


def test_a_checkpoint_that_was_complete_once_is_missed(tmp_path: Path) -> None:
    for steps in (10, 20, 30):
        checkpoint = tmp_path / f"checkpoint-{steps}"
        checkpoint.mkdir()
        (checkpoint / trainer.TRAINED).write_bytes(b"weights")
        if steps < 30:
            checkpoints.seal(checkpoint)
    flip(tmp_path / "checkpoint-20")
    events: list[Event] = []
    assert checkpoints.newest(tmp_path, events.append) == tmp_path / "checkpoint-10"
    damaged = tmp_path / "checkpoint-20"
    assert events == [Warned(f"{damaged} is damaged, and removed")]
    assert not damaged.exists()


def test_without_any_whole_checkpoint_it_starts_again(
    text: tuple[Tensor, Tensor], straight: Outcome, tmp_path: Path
) -> None:
    def break_all(folder: Path) -> None:
        for checkpoint in folder.glob("checkpoint-*"):
            unseal(checkpoint)

    resumed = run_interrupted(text, tmp_path, SHORT, at_step(20), between=break_all)

    assert resumed[1] == straight[1]
    assert equal(resumed[0], straight[0])


def test_a_full_disk_costs_checkpoints_and_not_the_run(
    text: tuple[Tensor, Tensor],
    straight: Outcome,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(tensors: Any, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(trainer, "save_file", full)
    student, teacher = pair(dropout=0.2)
    events: list[Event] = []
    healed = heal(
        student, teacher, *text, SHORT, checkpoints=tmp_path / "full", on_event=events.append
    )

    assert replace(healed, seconds=0.0) == straight[1]
    assert equal(weights(student), straight[0])
    warnings = [event.message for event in events if isinstance(event, Warned)]
    assert all("No space left on device" in message for message in warnings)
    assert warnings
    assert list((tmp_path / "full").glob("checkpoint-*")) == []


# What is refused


def test_checkpoints_of_another_run_are_refused(
    text: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    run_whole(text, tmp_path, replace(SHORT, epochs=1))
    student, teacher = pair()
    before = weights(student)

    with pytest.raises(RunError, match="has checkpoints already"):
        heal(student, teacher, *text, SHORT, checkpoints=tmp_path)
    with pytest.raises(RunError, match="another run: epochs, seed differ"):
        heal(
            student,
            teacher,
            *text,
            replace(SHORT, epochs=2, seed=7),
            checkpoints=tmp_path,
            resume=True,
        )
    with pytest.raises(RunError, match="training data differ"):
        heal(
            student,
            teacher,
            text[0][:-1],
            text[1],
            replace(SHORT, epochs=1),
            checkpoints=tmp_path,
            resume=True,
        )
    assert equal(weights(student), before)


def test_a_folder_that_cannot_be_made_is_one_clear_line(
    text: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    student, teacher = pair()

    with pytest.raises(RunError, match="cannot use"):
        heal(student, teacher, *text, SHORT, checkpoints=tmp_path / "file")


def test_a_loss_that_is_no_number_is_an_error(text: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    student, teacher = pair()
    with torch.no_grad():
        student.get_output_embeddings().weight[0, 0] = math.nan
    with pytest.raises(ModelError, match="validation loss became NaN"):
        heal(student, teacher, *text, SHORT, checkpoints=tmp_path / "start")

    student, teacher = pair()
    settings = replace(SHORT, learning_rate=1e30, warmup_ratio=0.0, max_grad_norm=0.0)
    with pytest.raises(ModelError, match="loss became NaN") as caught:
        heal(student, teacher, *text, settings, checkpoints=tmp_path / "later")
    assert "learning rate" in caught.value.hint


def test_unsound_arguments_are_refused(text: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    student, teacher = pair()

    with pytest.raises(UsageError, match="needs the base as teacher"):
        heal(student, None, *text, SHORT, checkpoints=tmp_path)
    with pytest.raises(UsageError, match="the same model"):
        heal(student, student, *text, SHORT, checkpoints=tmp_path)
    with pytest.raises(DataError, match="no validation windows"):
        heal(student, teacher, text[0], text[1][:0], SHORT, checkpoints=tmp_path)
    with pytest.raises(DataError, match="no training windows"):
        heal(student, teacher, text[0][:, :1], text[1], SHORT, checkpoints=tmp_path)
    with pytest.raises(UsageError, match="no parameters to train"):
        trained_names(random_model(0), "latents")
    assert list(tmp_path.iterdir()) == []


def test_every_value_out_of_range_is_named() -> None:
    settings = HealSettings(
        epochs=0, patience=0, batch_size=0, learning_rate=0, temperature=0, kl_weight=0,
        hidden_weight=0, warmup_ratio=1, max_steps=0, train="some", schedule="square",
        weight_decay=-1,
    )  # type: ignore[arg-type]  # fmt: skip

    with pytest.raises(UsageError) as caught:
        settings.validate()

    for name in ("epochs", "patience", "batch_size", "learning_rate", "temperature", "kl_weight",
                 "warmup_ratio", "max_steps", "train", "schedule", "weight_decay"):  # fmt: skip
        assert name in caught.value.message
    HealSettings().validate()


def test_the_default_matches_hidden_states_ten_times(
    text: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    settings = replace(SHORT, epochs=1)

    def healed(weight: float | None) -> tuple[dict[str, Tensor], Healed]:
        student, teacher = pair()
        chosen = replace(settings, hidden_weight=weight)
        done = heal(student, teacher, *text, chosen, checkpoints=tmp_path / str(weight))
        return weights(student), done

    (found, done), (ten, said), (none, _) = healed(None), healed(10.0), healed(0.0)

    assert equal(found, ten)
    assert not equal(found, none)
    assert done.settings == said.settings == replace(settings, hidden_weight=10.0)


@pytest.mark.parametrize(
    ("named", "weight"),
    [
        ({}, 10.0),
        ({"kl_weight": 0.0}, 10.0),
        ({"hidden_weight": 3.0}, 3.0),
        ({"hidden_weight": 0.0}, 0.0),
        ({"distill": False}, 0.0),
        ({"teacher_top_k": 4}, 0.0),
        ({"target": "layers"}, 0.0),
    ],
)
def test_a_weight_that_nobody_named_counts_where_it_can(
    named: dict[str, Any], weight: float, text: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    student, teacher = pair()
    settings = replace(SHORT, max_steps=1, save_steps=None, **named)

    healed = heal(student, teacher, *text, settings, checkpoints=tmp_path)

    assert healed.settings == replace(settings, hidden_weight=weight)
    kept = json.loads((tmp_path / checkpoints.IDENTITY).read_text())
    assert kept["hidden_weight"] == weight


@pytest.mark.parametrize("named", [{"distill": False}, {"teacher_top_k": 4}])
def test_a_weight_that_was_named_must_be_possible(named: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="hidden"):
        HealSettings(hidden_weight=3.0, **named).validate()


SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import test_heal as t
import torch
torch.set_num_threads(1)
windows = torch.load(sys.argv[2])
student, teacher = t.pair(dropout=0.2)
t.heal(student, teacher, *windows, t.SHORT_STEPS, checkpoints=Path(sys.argv[3]))
"""
SHORT_STEPS = replace(SHORT, save_steps=1, epochs=6)


@pytest.mark.slow
def test_a_process_that_is_killed_without_warning_can_be_resumed(
    text: tuple[Tensor, Tensor], tmp_path: Path
) -> None:
    straight = run_whole(text, tmp_path / "straight", SHORT_STEPS)
    torch.save(text, tmp_path / "text.pt")
    folder = tmp_path / "killed"
    here = str(Path(__file__).parent)
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, here, str(tmp_path / "text.pt"), str(folder)]
    )
    while not (folder / "checkpoint-12").exists() and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL

    student, teacher = pair(dropout=0.2)
    healed = heal(student, teacher, *text, SHORT_STEPS, checkpoints=folder, resume=True)

    assert replace(healed, seconds=0.0) == straight[1]
    assert equal(weights(student), straight[0])
