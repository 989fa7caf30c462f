"""``train`` and ``recipes check``, as a user types them, on shapes that take a second."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from conftest import Ended, Vdcompress
from vdcompress.pipeline.scratch_settings import Scratch
from vdcompress.recipe import load_recipe, parse

SEEDS = ("seed-vdproj", "seed-baseline", "seed-restore-e2e", "seed-restore-2phase")
TINY = {
    "scratch.vocab_size": 4096,
    "scratch.hidden_size": 32,
    "scratch.num_hidden_layers": 2,
    "scratch.num_attention_heads": 4,
    "scratch.rotary_pct": 0.5,
    "scratch.intermediate_size": 32,
    "scratch.tokenizer": "demo",
    "heal.samples": 32,
    "heal.validation_samples": 8,
    "heal.learning_rate": 1e-2,
    "evaluation.windows": 6,
}
SHORT = ("--epochs", "2", "--seq-len", "32", "--positions", "0,16,32")


def tiny(name: str, **more: Any) -> Path:
    """Write a shipped recipe with a tiny shape, and return its file."""
    recipe = load_recipe(name)
    narrow = {"plan.v_dim": 20} if recipe.plan.v_dim else {}
    if recipe.scratch and recipe.scratch.restore_from:
        narrow = {"scratch.restore_from": 20}
    path = Path(f"{name}.yaml")
    path.write_text(recipe.merged(TINY | narrow | more).dumps())
    return path


def refused(ended: Ended, code: int, *says: str) -> None:
    assert ended.code == code, ended.err
    assert ended.out == ""
    for words in says:
        assert words in ended.err


@pytest.mark.parametrize("name", SEEDS)
def test_each_recipe_trains_and_becomes_a_run(
    vdcompress: Vdcompress, text_file: Path, name: str
) -> None:
    ended = vdcompress("train", tiny(name), "--data", text_file, *SHORT, "--json")
    assert ended.code == 0, ended.err
    found = ended.json
    [run] = Path("runs").iterdir()
    assert run.name.startswith(f"{name}-scratch-")
    saved = json.loads((run / "results.json").read_text())
    assert saved | {"seconds": 0} == found | {"seconds": 0}
    assert (found["command"], found["run"], found["gate"]) == ("train", str(run), None)

    smaller = 12 / 64 if name == "seed-vdproj" else 0.0
    assert found["kv_cache"]["reduction"] == pytest.approx(smaller)
    assert found["kv_cache"]["measured"]["reduction"] == pytest.approx(smaller)
    more_weights = found["cost"]["compressed"]["weights"] - found["cost"]["base"]["weights"]
    assert (more_weights > 0) == name.startswith("seed-restore")

    healing = found["healing"]
    assert len(healing["epochs"]) <= 2
    assert healing["best_epoch"] >= 1
    assert (found["first_phase"] is not None) == (name == "seed-restore-2phase")

    perplexity, positions = found["perplexity"], found["positions"]
    assert (perplexity["window"], perplexity["tokens"]) == (32, 6 * 32)
    assert perplexity["base"] is perplexity["healed"] is None
    assert [(bucket["from"], bucket["to"]) for bucket in positions] == [(0, 16), (16, 32)]
    mean = sum(math.log(bucket["compressed"]) for bucket in positions) / 2
    assert perplexity["compressed"] == pytest.approx(math.exp(mean))
    assert perplexity["compressed"] < 4096 / 2

    recipe = parse(yaml.safe_load((run / "recipe.yaml").read_text()), "saved")
    model: Any = Scratch.of(recipe).model()
    model.load_state_dict(load_file(run / "model.safetensors"), strict=True)
    assert sum(p.numel() for p in model.parameters()) == found["parameters"]["compressed"]
    assert len({path.stat().st_mode for path in run.iterdir()}) == 1
    card = (run / "README.md").read_text()
    assert name in card
    assert "| 0-16 |" in card


def test_a_run_from_scratch_is_only_to_be_compared_with(
    vdcompress: Vdcompress, text_file: Path
) -> None:
    ended = vdcompress("train", tiny("seed-restore-e2e"), "--data", text_file, *SHORT, "-o", "r")
    assert ended.code == 0, ended.err
    assert "written to r" in ended.out
    for verb in ("export", "evaluate", "finetune", "inspect"):
        refused(vdcompress(verb, "r"), 3, "was trained from scratch", "r/results.json")
    assert {path.name for path in Path().iterdir()} == {"r", "seed-restore-e2e.yaml"}


def untimed(epochs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: x for name, x in epoch.items() if name != "seconds"} for epoch in epochs]


def test_interrupted_and_resumed(
    vdcompress: Vdcompress, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from test_bad_input import interrupt_at

    recipe = tiny("seed-restore-2phase", **{"scratch.first_phase.epochs": 1})
    command = ("train", recipe, "--data", text_file, *SHORT, "--json")
    with monkeypatch.context() as patch:
        interrupt_at(patch, "epoch 2", KeyboardInterrupt)
        ended = vdcompress(*command)
    assert ended.code == 130
    [partial] = Path("runs").iterdir()
    assert ended.err.splitlines()[-2:] == [
        f"interrupted: checkpoints are kept in {partial}",
        f"hint: continue with: vdcompress train --resume {partial}",
    ]
    refused(vdcompress("finetune", "--resume"), 3, "no interrupted finetune")
    refused(vdcompress("finetune", "--resume", partial), 3, "another command", "train --resume")
    refused(vdcompress("train", "--resume", "--epochs", "3"), 2, "--epochs")
    resumed = vdcompress("train", "--resume", "--json")
    assert resumed.code == 0, resumed.err
    [run] = Path("runs").iterdir()
    assert resumed.json["run"] == str(run)
    whole = vdcompress(*command).json
    for part in ("first_phase", "healing"):
        assert untimed(resumed.json[part]["epochs"]) == untimed(whole[part]["epochs"])
    assert resumed.json["perplexity"] == whole["perplexity"]


def test_interrupted_before_the_first_checkpoint_nothing_is_left(
    vdcompress: Vdcompress, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from test_bad_input import interrupt_at

    interrupt_at(monkeypatch, "finetune", KeyboardInterrupt)
    ended = vdcompress("train", tiny("seed-vdproj"), "--data", text_file, *SHORT)
    assert ended.code == 130
    assert ended.err.splitlines()[-1] == "interrupted: nothing was written"
    assert list(Path("runs").iterdir()) == []


def test_what_train_cannot_do_is_said(vdcompress: Vdcompress, text_file: Path) -> None:
    refused(vdcompress("train"), 2, "which recipe?", "seed-vdproj")
    refused(vdcompress("train", "demo"), 2, "starts from a model", "apply --recipe demo")
    refused(vdcompress("train", "--resume"), 3, "no interrupted training")
    refused(vdcompress("apply", "--recipe", "seed-vdproj"), 2, "from scratch", "train seed-vdproj")
    small = tiny("seed-vdproj", **{"scratch.vocab_size": 100})
    refused(
        vdcompress("train", small, "--data", text_file), 3, "4,096 tokens", "scratch.vocab_size"
    )
    refused(vdcompress("train", "seed-vdproj", "--tokenizer", "./nowhere"), 3, "nowhere")
    assert not Path("runs").exists()


def unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr("vdcompress.hub.snapshot_download", fail)


def test_check_says_what_the_original_builds_without_a_hub(
    vdcompress: Vdcompress, monkeypatch: pytest.MonkeyPatch
) -> None:
    unreachable(monkeypatch)
    ended = vdcompress("recipes", "check", "seed-vdproj", "--json")
    assert ended.code == 0, ended.err
    found = ended.json
    assert found["parameters"]["compressed"] == 69_239_680
    assert found["parameters"]["v_path"] == 1_971_072
    assert (found["plan"]["v_dim"], found["plan"]["v_groups"]) == (320, 8)
    assert found["kv_cache"]["bytes_per_token"] == 9984
    assert found["kv_cache"]["reduction"] == 0.1875
    assert (found["sound"], found["settled_by"]) == (True, "recipe")
    shown = vdcompress("recipes", "check", "seed-vdproj").out
    for words in ("69,239,680", "1,971,072", "9,984", "8 x 40"):
        assert words in shown
    restoring = vdcompress("recipes", "check", "seed-restore-e2e", "--json").json
    assert restoring["kv_cache"]["reduction"] == 0.0


def test_check_agrees_with_a_dry_run(vdcompress: Vdcompress) -> None:
    checked = vdcompress("recipes", "check", "demo", "--json").json
    planned = vdcompress("apply", "--recipe", "demo", "--dry-run", "--json").json
    for part in ("model", "plan", "parameters", "kv_cache", "cost"):
        assert checked[part] == planned[part], part


@pytest.mark.parametrize(
    ("plan", "share"),
    [
        ("{kv_budget: 0.5}", 0.5),
        ("{v_dim: 128, k_dim: 128, groups: 1}", 0.5),
        ("{v_dim: 128, allocation: layers}", 0.75),
    ],
)
def test_check_says_when_calibration_decides(
    vdcompress: Vdcompress, plan: str, share: float
) -> None:
    Path("mine.yaml").write_text(f"version: 1\nname: mine\nmodel: demo\nplan: {plan}\n")
    ended = vdcompress("recipes", "check", "mine.yaml", "--json")
    assert ended.code == 0, ended.err
    found = ended.json
    assert (found["plan"], found["settled_by"]) == (None, "calibration")
    assert found["parameters"]["base"] == 3_682_816
    assert found["kv_cache"]["bytes_per_token"] == share * 4096
    assert found["kv_cache"]["reduction"] == 1 - share
    assert "settled by calibration" in vdcompress("recipes", "check", "mine.yaml").out


def test_check_needs_the_config_of_a_model(
    vdcompress: Vdcompress, monkeypatch: pytest.MonkeyPatch
) -> None:
    unreachable(monkeypatch)
    ended = vdcompress("recipes", "check", "pythia-70m-v320", "--json")
    refused(ended, 3, "the hub cannot be reached", "EleutherAI/pythia-70m")
