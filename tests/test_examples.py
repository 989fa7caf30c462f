"""Every example runs, and says what it promises."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("*.py"))
SAYS = {
    "compress_in_one_call": r"4,096 bytes per token before, 3,328 after \(-18\.8%\), 3,328 meas",
    "step_by_step": r"healed +2,816 .*\n.*\n.*exported loads without vdcompress",
    "reload_anywhere": r"3  \[1, 4, \d+, 64\] +\[1, 4, \d+, 24\]",
    "half_the_cache": r"2048 bytes per token.*\n  perplexity \d\.\d+ -> \d\.\d+",
    "compare_starts": r"optimal( +\d+\.\d{3}){4}\n",
    "evaluate_with_lm_eval": r"next_line acc_norm [01]\.\d{3} of 16 by --model hf",
}
WRITES = ("step_by_step",)
NEEDS = {"evaluate_with_lm_eval": "lm_eval"}


def test_every_example_is_listed() -> None:
    listed = re.findall(r"^\| `(\w+)\.py`", (EXAMPLES / "README.md").read_text(), re.MULTILINE)
    assert sorted(listed) == SCRIPTS == sorted(SAYS)


@pytest.mark.parametrize("name", ["compress_in_one_call"])
def test_it_runs_in_this_process(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--quick"])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert re.search(SAYS[name], capsys.readouterr().out)


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_it_runs_alone(name: str, tmp_path: Path) -> None:
    if name in NEEDS and find_spec(NEEDS[name]) is None:
        pytest.skip(f"{NEEDS[name]} is not installed")
    output = ["exported"] if name in WRITES else []
    ended = subprocess.run(
        [sys.executable, EXAMPLES / f"{name}.py", *output, "--quick"],
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
    left = {path.name for path in tmp_path.iterdir()} - {"modules"}
    assert left == set(output)
