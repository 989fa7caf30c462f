"""``finetune`` as a user has it: recipes, epochs on a terminal, curves and logs in the run."""

from __future__ import annotations

import errno
import importlib.util
import io
import json
import os
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from conftest import Vdcompress
from test_bad_input import assert_refused
from vdcompress.cli.epochs import EpochTable
from vdcompress.cli.progress import Display
from vdcompress.events import EpochEnded, HealingBegan, StageEnded, StageStarted
from vdcompress.healing.trackers import logging_to
from vdcompress.plots_healing import curves
from vdcompress.recipe import Recipe, load_recipe

HEAL = ("--samples", "16", "--seq-len", "32", "--epochs", "2")
PNG = b"\x89PNG\r\n\x1a\n"


# Recipes


def written(text: str) -> Recipe:
    Path("mine.yaml").write_text(f"version: 1\n{text}\n")
    return load_recipe("mine.yaml")


def test_a_recipe_of_a_heal_section_alone_heals(vdcompress: Vdcompress, tiny_run: Path) -> None:
    written("heal: {epochs: 1, learning_rate: 1.0e-3, train: latents, batch_size: 8}")

    ended = vdcompress(
        "finetune", tiny_run, "--recipe", "mine.yaml", "--batch-size", "4", "-o", "r"
    )

    assert ended.code == 0, ended.err
    heal = yaml.safe_load(Path("r/recipe.yaml").read_text())["heal"]
    assert (heal["epochs"], heal["train"]) == (1, "latents")
    assert heal["batch_size"] == 4  # flags beat the recipe
    assert heal["samples"] == 16  # the run's own says what the recipe leaves out
    assert vdcompress("recipes", "check", "mine.yaml").code == 0


def test_flags_beat_the_recipe_and_it_beats_the_runs_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    own = Recipe().merged(
        {"plan.v_dim": 8, "heal.epochs": 5, "heal.bf16": True, "heal.samples": 7, "model": "a"}
    )
    other = written(
        "model: b\nplan: {v_dim: 16}\ncalibration: {samples: 3}\nevaluation: {windows: 9}\n"
        "heal: {epochs: 2, bf16: null}\ngate: {max_ratio: 1.5}"
    )

    found = own.healed_as(other)

    assert (found.model, found.plan.v_dim, found.calibration.samples) == ("a", 8, 64)
    assert (found.heal.epochs, found.heal.bf16, found.heal.samples) == (2, None, 7)
    assert found.evaluation.windows == 9
    assert found.evaluation.seq_len == own.evaluation.seq_len
    assert found.gate is not None
    assert found.gate.max_ratio == 1.5
    assert own.healed_as(written("heal: {}")) == own
    assert found.healed_as(written("gate: null")).gate is None


def test_every_setting_of_the_command_line_arrives(vdcompress: Vdcompress, tiny_run: Path) -> None:
    given = {
        "micro_batch": 2, "batch_size": 4, "max_steps": 3, "save_steps": 2, "validation_samples": 5,
    }  # fmt: skip
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]

    ended = vdcompress(
        *("finetune", tiny_run, *HEAL, *flags, "--gradient-checkpointing", "--bf16", "-o", "r")
    )

    assert ended.code == 0, ended.err
    heal = yaml.safe_load(Path("r/recipe.yaml").read_text())["heal"]
    assert heal | given | {"gradient_checkpointing": True, "bf16": True} == heal
    assert json.loads(Path("r/results.json").read_text())["healing"]["tokens"] == 3 * 4 * 31


@pytest.mark.parametrize(
    ("heal", "flags", "weight"),
    [
        ("{}", (), 10.0),
        ("{}", ("--no-distill",), 0.0),
        ("{teacher_top_k: 4}", (), 0.0),
        ("{hidden_weight: 0.5}", (), 0.5),
    ],
)
def test_the_results_say_how_it_was_healed(
    vdcompress: Vdcompress, tiny_run: Path, heal: str, flags: tuple[str, ...], weight: float
) -> None:
    written(f"heal: {heal}")

    ended = vdcompress("finetune", tiny_run, *HEAL, *flags, "--recipe", "mine.yaml", "-o", "r")

    assert ended.code == 0, ended.err
    healing = json.loads(Path("r/results.json").read_text())["healing"]
    assert healing["settings"]["hidden_weight"] == weight
    assert healing["settings"]["distill"] == (not flags)
    assert healing["settings"]["epochs"] == 2


def test_a_healed_run_can_be_healed_in_another_way(vdcompress: Vdcompress, tiny_run: Path) -> None:
    assert vdcompress("finetune", tiny_run, *HEAL, "-o", "r").code == 0

    ended = vdcompress("finetune", "r", "--no-distill", "-o", "again")

    assert ended.code == 0, ended.err


def test_a_long_finetune_takes_the_model_of_the_run(vdcompress: Vdcompress, tiny_run: Path) -> None:
    ended = vdcompress("finetune", tiny_run, "--recipe", "long", "--seq-len", "32", "-o", "r")

    assert ended.code == 0, ended.err
    own, found = (
        yaml.safe_load((run / "recipe.yaml").read_text()) for run in (tiny_run, Path("r"))
    )
    assert {**found, "heal": 0} == {**own, "heal": 0}
    assert found["heal"]["samples"] == 200_000
    assert "sequences for training, not 200,000" in ended.err
    settings = json.loads(Path("r/results.json").read_text())["healing"]["settings"]
    assert (settings["batch_size"], settings["epochs"]) == (32, 1)
    assert settings["hidden_weight"] == 10.0


@pytest.mark.parametrize(
    ("flags", "code", "says"),
    [
        (("--recipe", "nothing"), 3, "no recipe 'nothing'"),
        (("--report-to", "tensorbord"), 2, "did you mean 'tensorboard'?"),
        (("--micro-batch", "3", "--batch-size", "4"), 2, "multiple of micro_batch"),
        (("--epochs", "31"), 2, "less than or equal to 30"),
        (("--recipe", "named.yaml", "--no-distill"), 2, "hidden_weight"),
        (("--resume", "--recipe", "demo"), 2, "not with --recipe"),
        (("--resume", "--report-to", "wandb"), 2, "not with --report-to"),
    ],
)
def test_wrong_settings_are_told_before_any_work(
    vdcompress: Vdcompress, tiny_run: Path, flags: tuple[str, ...], code: int, says: str
) -> None:
    Path("named.yaml").write_text("version: 1\nheal: {hidden_weight: 3}\n")

    ended = vdcompress("finetune", tiny_run, *flags)

    Path("named.yaml").unlink()
    assert_refused(ended, code, says)
    assert "load" not in ended.err


# The run's folder


def test_the_curves_are_in_the_run_and_in_its_export(
    vdcompress: Vdcompress, tiny_run: Path
) -> None:
    ended = vdcompress("finetune", tiny_run, *HEAL, "-o", "healed")

    assert ended.code == 0, ended.err
    assert Path("healed/curves.png").read_bytes().startswith(PNG)
    assert "![" in Path("healed/README.md").read_text()
    assert vdcompress("export", "healed", "-o", "out").code == 0
    assert Path("out/curves.png").read_bytes() == Path("healed/curves.png").read_bytes()
    assert not (tiny_run / "curves.png").exists()
    assert "![" not in (tiny_run / "README.md").read_text()


def test_each_epoch_says_its_tokens_and_seconds(vdcompress: Vdcompress, tiny_run: Path) -> None:
    healing = vdcompress("finetune", tiny_run, *HEAL, "--patience", "9", "--json").json["healing"]

    assert [epoch["tokens"] for epoch in healing["epochs"]] == [16 * 31] * 2
    spent = sum(epoch["seconds"] for epoch in healing["epochs"])
    assert 0 < spent < healing["seconds"]


def test_a_resumed_finetune_counts_the_time_before(
    vdcompress: Vdcompress, tiny_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from test_bad_input import interrupt_at

    with monkeypatch.context() as patch:
        interrupt_at(patch, "epoch 2", KeyboardInterrupt)
        ended = vdcompress("finetune", tiny_run, *HEAL, "--patience", "9")
    assert ended.code == 130
    [partial] = Path("runs").iterdir()
    [state] = partial.glob("checkpoint-*/trainer_state.json")
    content = json.loads(state.read_text())
    record = content["stateful_callbacks"]["Epochs"]["attributes"]
    assert record["seconds"] > 0
    record["seconds"] += 1000
    monkeypatch.setattr("vdcompress.healing.checkpoints.is_complete", lambda _: True)
    state.write_text(json.dumps(content))

    resumed = vdcompress("finetune", "--resume", "--json")

    assert resumed.code == 0, resumed.err
    assert resumed.json["healing"]["seconds"] > 1000
    assert resumed.json["seconds"]["finetune"] > 1000
    assert "Epoch 0: val_ppl=" in resumed.err
    assert resumed.err.count("Epoch 1: train_ppl=") == 1  # told again, trained once


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="needs tensorboard")
def test_the_logs_of_trackers_are_kept_with_the_run(
    vdcompress: Vdcompress, tiny_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    ended = vdcompress("finetune", tiny_run, *HEAL, "--report-to", "tensorboard", "-o", "healed")

    assert ended.code == 0, ended.err
    [log] = Path("healed/logs").rglob("events.out.tfevents.*")
    logged = EventAccumulator(str(log)).Reload().Scalars("train/validation_perplexity")
    epochs = json.loads(Path("healed/results.json").read_text())["healing"]["epochs"]
    expected = [epoch["val_ppl"] for epoch in epochs]
    assert [scalar.value for scalar in logged] == pytest.approx(expected, rel=1e-5)
    assert not Path("healed.partial").exists()


class Tracked:
    """A run of wandb that knows whether it was finished."""

    finished = False

    def finish(self) -> None:
        self.finished = True


def test_trackers_have_finished_before_their_logs_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = types.ModuleType("wandb")
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.delenv("WANDB_DIR", raising=False)
    begun, callers_own = Tracked(), Tracked()

    with logging_to(tmp_path / "logs", ["wandb"]):
        assert os.environ["WANDB_DIR"] == str(tmp_path / "logs")
        assert (tmp_path / "logs").is_dir()
        wandb.run = begun  # type: ignore[attr-defined]
    wandb.run = callers_own  # type: ignore[attr-defined]
    with logging_to(tmp_path / "others", ["wandb"]):
        pass
    with logging_to(tmp_path / "none", []):
        assert "WANDB_DIR" not in os.environ

    assert begun.finished
    assert not callers_own.finished
    assert not (tmp_path / "none").exists()


# What goes wrong


def test_text_that_is_missing_is_told_before_anything_is_measured(
    vdcompress: Vdcompress, tiny_run: Path, text_file: Path
) -> None:
    Path("empty.txt").write_text("\n")

    ended = vdcompress("finetune", tiny_run, "--data", "empty.txt", "--eval-data", text_file)

    assert_refused(ended, 3, "empty.txt holds no text")
    assert "evaluate" not in ended.err


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_run_that_cannot_be_written_is_finished_from_its_checkpoint(
    vdcompress: Vdcompress, tiny_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("vdcompress.artifact.save_torch_state_dict", full)
        ended = vdcompress("finetune", tiny_run, *HEAL, "-o", "out/healed")
    assert ended.code == 3
    assert "No space left" in ended.err
    assert "--resume out/healed.partial" in ended.err
    assert [path.name for path in Path("out").iterdir()] == ["healed.partial"]

    resumed = vdcompress("finetune", "--resume", "out/healed.partial")

    assert resumed.code == 0, resumed.err
    assert "Epoch" not in resumed.err  # nothing was trained again
    assert [path.name for path in Path("out").iterdir()] == ["healed"]


def test_without_room_for_anything_nothing_is_left(
    vdcompress: Vdcompress, tiny_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vdcompress.artifact.save_torch_state_dict", full)
    monkeypatch.setattr("vdcompress.healing.trainer.save_file", full)

    ended = vdcompress("finetune", tiny_run, *HEAL, "-o", "out/healed")

    assert "could not be saved: [Errno 28] No space left on device" in ended.err
    assert_refused(ended, 3, "No space left")
    assert "checkpoints are kept" not in ended.err


def test_a_full_disk_under_torchs_writer_is_told_in_words(
    vdcompress: Vdcompress, tiny_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unclear(*_: Any, **__: Any) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 5 vs 4")

    monkeypatch.setattr("torch.save", unclear)

    ended = vdcompress("finetune", tiny_run, *HEAL, "--epochs", "1")

    assert ended.code == 0, ended.err
    assert "could not be saved: a file could not be written whole" in ended.err


# On a terminal


EPOCHS = [
    EpochEnded(1, 24.0, 22.90, best=True, tokens=12_000, seconds=2.0),
    EpochEnded(2, 23.0, 22.75, best=True, tokens=12_000, seconds=2.4),
    EpochEnded(3, 22.0, 22.80, best=False, tokens=12_000, seconds=2.4),
]


@pytest.fixture
def screen() -> Callable[..., str]:
    """Return what shows events on a terminal and returns what is left on it."""

    def shown(*events: Any, width: int = 80, height: int = 24) -> str:
        stream = io.StringIO()
        console = Console(
            file=stream, force_terminal=True, width=width, height=height, color_system=None,
            legacy_windows=False,
        )  # fmt: skip
        with Display(console) as display:
            for event in events:
                display(event)
        return re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", stream.getvalue())

    return shown


def rows_of(text: str) -> list[list[str]]:
    """Return the cells of the last table of epochs drawn."""
    table = text[text.rindex("epoch   train ppl") :]
    return [line.split() for line in table.splitlines()[2:] if line.strip()]


def test_epochs_are_a_table_that_stays(screen: Callable[..., str]) -> None:
    begun = (StageStarted("finetune", 30), HealingBegan(22.976, 3))

    text = screen(*begun, *EPOCHS, StageEnded("finetune", 7.0))

    start, *rows, ended = rows_of(text)
    assert start == ["start", "22.98"]
    assert rows == [
        ["1", "24.00", "22.90", "-0.33%", "6,000", "2.0", "s"],
        ["2", "23.00", "22.75", "-0.98%", "5,000", "2.4", "s", "best"],
        ["3", "22.00", "22.80", "-0.77%", "5,000", "2.4", "s"],
    ]
    assert ended == ["✓", "finetune", "7.0", "s"]


def test_a_resumed_table_begins_with_the_epochs_before(screen: Callable[..., str]) -> None:
    text = screen(
        StageStarted("finetune", 30),
        HealingBegan(22.976, 3, tuple(EPOCHS[:2])),
        EPOCHS[2],
        StageEnded("finetune", 7.0),
    )

    assert [row[0] for row in rows_of(text)[:4]] == ["start", "1", "2", "3"]


def test_the_start_is_best_until_an_epoch_is(screen: Callable[..., str]) -> None:
    worse = EpochEnded(1, 24.0, 23.1, best=False, tokens=100, seconds=1.0)

    text = screen(
        StageStarted("finetune", 9), HealingBegan(22.976, 3), worse, StageEnded("finetune", 1)
    )

    assert rows_of(text)[0] == ["start", "22.98", "best"]


def test_a_low_terminal_shows_the_last_epochs_and_leaves_all(screen: Callable[..., str]) -> None:
    many = [EpochEnded(n, 20.0, 20.0, best=n == 1, tokens=1, seconds=1.0) for n in range(1, 21)]
    begun = (StageStarted("finetune", 20), HealingBegan(22.0, 20))

    text = screen(*begun, *many, StageEnded("finetune", 7.0), height=14)

    assert [row[0] for row in rows_of(text)[1:21]] == [str(n) for n in range(1, 21)]
    table = EpochTable(begun[1])
    for epoch in many:
        table.add(epoch)
    console = Console(file=io.StringIO(), width=80)
    assert len(console.render_lines(table.drawn(14))) + 3 <= 14  # bars, and a line to spare


@pytest.mark.parametrize("best", [0, 1, 3])
@pytest.mark.parametrize("spread", [1e-4, 1.0, 1e4])
def test_any_course_can_be_drawn(best: int, spread: float) -> None:
    epochs = [
        {"epoch": n, "train_ppl": 20 + spread * n, "val_ppl": 20 + spread / n} for n in range(1, 4)
    ]
    healing = {
        "best_epoch": best, "initial_val_ppl": 20 + 2 * spread, "tokens": 10, "seconds": 3.0,
        "epochs": epochs,
    }  # fmt: skip
    found = {"model": {"id": "a/b"}, "kv_cache": {"reduction": 0.1875}, "healing": healing}

    assert curves(found).startswith(PNG)
