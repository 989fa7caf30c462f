"""``evaluate --lm-eval`` hands both models to lm-evaluation-harness, or says that it is missing."""

from __future__ import annotations

import runpy
import subprocess
import sys
import types
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from conftest import Vdcompress
from vdcompress import harness
from vdcompress.errors import UsageError

EXAMPLE = Path(__file__).parents[1] / "examples" / "evaluate_with_lm_eval.py"
installed = pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm_eval is not installed")


def test_a_missing_harness_is_one_line_and_a_hint(
    tiny_run: Path, vdcompress: Vdcompress, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "find_spec", lambda _name: None)
    ended = vdcompress("evaluate", tiny_run, "--lm-eval", "piqa")
    assert ended.code == 2
    assert ended.err.splitlines() == [
        "error: lm-evaluation-harness is not installed",
        "hint: pip install 'lm_eval[hf]'",
    ]


def test_tasks_are_names_or_files_that_exist(tmp_path: Path) -> None:
    task = tmp_path / "own.yaml"
    task.write_text("task: own\n")
    assert harness.task_names(f"piqa, {task}") == ["piqa", str(task)]
    with pytest.raises(UsageError, match="there is no task file nowhere"):
        harness.task_names("nowhere.yaml")
    with pytest.raises(UsageError, match="names no task"):
        harness.task_names(" , ")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Stand in for the harness: accuracy is the number of questions asked so far."""
    calls: list[dict[str, Any]] = []

    def simple_evaluate(model: Any, **options: Any) -> dict[str, Any]:
        if options["tasks"] == ["unknown"]:
            raise ValueError("task unknown\n not found")
        calls.append({"model": model, **options})
        figures = {"alias": "own", "acc,none": len(calls) / 4, "acc_stderr,none": "N/A"}
        return {"results": {"own": figures | {"sample_len": 4, "exact_match,strict": 0.5}}}

    module = types.ModuleType("lm_eval")
    module.simple_evaluate = simple_evaluate  # type: ignore[attr-defined]
    huggingface = types.ModuleType("lm_eval.models.huggingface")
    huggingface.HFLM = lambda **given: given["pretrained"]  # type: ignore[attr-defined]
    tasks = types.ModuleType("lm_eval.tasks")
    tasks.TaskManager = object  # type: ignore[attr-defined]
    stand_ins = {
        "lm_eval": module,
        "lm_eval.models.huggingface": huggingface,
        "lm_eval.tasks": tasks,
    }
    for name, made in stand_ins.items():
        monkeypatch.setitem(sys.modules, name, made)
    monkeypatch.setitem(sys.modules, "lm_eval.models", types.ModuleType("lm_eval.models"))
    monkeypatch.setattr(harness, "find_spec", lambda _name: object())
    return calls


def test_base_and_compressed_answer_the_same_tasks(
    tiny_run: Path, vdcompress: Vdcompress, asked: list[dict[str, Any]]
) -> None:
    ended = vdcompress("evaluate", tiny_run, "--lm-eval", "own", "--limit", "4", "--json")
    assert ended.code == 0, ended.err
    assert ended.json["tasks"] == {
        "own": {
            "acc": {"base": 0.25, "compressed": 0.5},
            "exact_match,strict": {"base": 0.5, "compressed": 0.5},
        }
    }
    assert [type(call["model"]).__name__ for call in asked] == [
        "GPTNeoXForCausalLM",
        "VDGPTNeoXForCausalLM",
    ]
    assert {call["limit"] for call in asked} == {4}
    assert len({call["task_manager"] for call in asked}) == 1  # its index takes seconds to build
    shown = vdcompress("evaluate", tiny_run, "--lm-eval", "own")
    assert "lm-evaluation-harness" in shown.out


def test_what_the_harness_refuses_is_said_in_one_line(
    tiny_run: Path, vdcompress: Vdcompress, asked: list[dict[str, Any]]
) -> None:
    ended = vdcompress("evaluate", tiny_run, "--lm-eval", "unknown")
    assert ended.code == 2
    assert "task unknown not found" in ended.err


@pytest.mark.slow
@installed
def test_an_exported_folder_scores_alike_by_lm_eval_and_by_evaluate(
    tiny_run: Path, tmp_path: Path, vdcompress: Vdcompress, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The example asks lm_eval itself, as a user does."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    assert vdcompress("export", tiny_run, "-o", "exported").code == 0
    ended = subprocess.run(
        [sys.executable, EXAMPLE, "exported", "--quick"],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert ended.returncode == 0, ended.stderr
    task = runpy.run_path(str(EXAMPLE))["write_task"](tmp_path, 16)
    own = vdcompress("evaluate", tiny_run, "--lm-eval", task, "--json").json["tasks"]["next_line"]
    assert ended.stdout.splitlines() == [
        f"next_line {metric} {own[metric]['compressed']:.3f} of 16 by --model hf"
        for metric in ("acc", "acc_norm")
    ]
