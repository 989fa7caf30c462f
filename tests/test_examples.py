"""Every example runs, and says what it promises."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("*.py"))
IN_PROCESS = "compress_in_one_call"
STEPS = r"healed +2,816 .*\n.*\n.*exported loads without vdcompress"
SAYS = {
    IN_PROCESS: r"4,096 bytes per token before, 3,328 after \(-18\.8%\), 3,328 meas",
    "reload_anywhere": STEPS + r"(?s:.*)3  \[1, 4, \d+, 64\] +\[1, 4, \d+, 24\]",
    "half_the_cache": r"2048 bytes per token.*\n  perplexity \d\.\d+ -> \d\.\d+",
    "compare_starts": r"optimal( +\d+\.\d{3}){4}\n",
}
ALONE = sorted(set(SAYS) - {IN_PROCESS})
WITHIN = ("step_by_step", "evaluate_with_lm_eval")  # run by reload_anywhere, by test_harness.py


def test_every_example_is_listed() -> None:
    listed = re.findall(r"^\| `(\w+)\.py`", (EXAMPLES / "README.md").read_text(), re.MULTILINE)
    assert sorted(listed) == SCRIPTS == sorted({*SAYS, *WITHIN})


def test_it_runs_in_this_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{IN_PROCESS}.py", "--quick"])
    runpy.run_path(str(EXAMPLES / f"{IN_PROCESS}.py"), run_name="__main__")
    assert re.search(SAYS[IN_PROCESS], capsys.readouterr().out)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ALONE)
def test_it_runs_alone(name: str, tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, EXAMPLES / f"{name}.py", "--quick"],
        capture_output=True,
        text=True,
        check=False,
        stdin=subprocess.DEVNULL,
        cwd=tmp_path,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")},
    )
    assert ended.returncode == 0, ended.stderr
    assert re.search(SAYS[name], ended.stdout), ended.stdout
    assert "[y/N]" not in ended.stdout, "transformers asked whether to trust"
    assert {path.name for path in tmp_path.iterdir()} <= {"modules"}


def test_the_harness_judges_a_folder_made_for_it_where_none_is_given(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands: list[list[str]] = []

    def run(command: list[Any], **options: Any) -> subprocess.CompletedProcess[str]:
        commands.append([str(word) for word in command])
        if "lm_eval" in command:
            answers = Path(command[-1]) / "model"
            answers.mkdir(parents=True)
            found = {"next_line": {"acc,none": 0.25, "acc_norm,none": 0.5}}
            (answers / "results_now.json").write_text(json.dumps({"results": found}))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(sys, "argv", ["evaluate_with_lm_eval.py", "--quick"])
    runpy.run_path(str(EXAMPLES / "evaluate_with_lm_eval.py"), run_name="__main__")

    made, judged = commands
    script, folder, quick = made[1:]
    assert (script, quick) == (str(EXAMPLES / "step_by_step.py"), "--quick")
    arguments = judged[judged.index("--model_args") + 1]
    assert arguments.startswith(f"pretrained={folder},trust_remote_code=True")
    assert capsys.readouterr().out.splitlines() == [
        "next_line acc 0.250 of 16 by --model hf",
        "next_line acc_norm 0.500 of 16 by --model hf",
    ]
