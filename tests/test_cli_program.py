"""The program itself: help, version, how fast it starts and how it ends."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from conftest import Vdcompress

PROGRAM = "import sys; from vdcompress.cli.app import main; main()"
COMMANDS = (
    *("apply", "finetune", "evaluate", "bench", "export", "inspect"),
    *("sweep", "train", "recipes", "demo"),
)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(vdcompress: Vdcompress, command: str) -> None:
    ended = vdcompress(command, "--help")
    assert ended.code == 0
    assert "Usage: vdcompress" in ended.out


def test_help_imports_nothing_heavy() -> None:
    program = (
        "import sys; from vdcompress.cli.app import run; run(['--help']);"
        "heavy = {'torch', 'transformers', 'datasets', 'pydantic', 'yaml', 'sklearn', "
        "'matplotlib'};sys.exit(','.join(heavy & set(sys.modules)) or 0)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr


def test_version(vdcompress: Vdcompress) -> None:
    assert vdcompress("--version").out.startswith("vdcompress ")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["aply"], "No such command 'aply'"),
        (["apply", "--v-dim", "wide"], "'--v-dim'"),
        (["apply", "m", "--windows", "0"], "'--windows'"),
        (["apply", "--nonsense"], "--nonsense"),
        (["finetune", "a", "b"], "unexpected extra argument"),
        (["finetune", "a", "--train", "foo"], "'--train': 'foo' is not one of"),
    ],
)
def test_usage_errors_are_two_lines(
    vdcompress: Vdcompress, arguments: list[str], says: str
) -> None:
    ended = vdcompress(*arguments)
    assert ended.code == 2
    assert says in ended.err
    error, hint = ended.err.splitlines()
    assert error.startswith("error: ")
    assert hint.startswith("hint: see: vdcompress")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["finetune", "run", "--data", ""], "what follows --data is empty"),
        (["finetune", "run", "--data="], "--data is empty"),
        (["compare", ""], "an argument is empty"),
    ],
)
def test_an_empty_argument_is_not_taken_for_none(
    vdcompress: Vdcompress, arguments: list[str], says: str
) -> None:
    ended = vdcompress(*arguments)
    assert ended.code == 2
    error, hint = ended.err.splitlines()
    assert error == f"error: {says}"
    assert hint.startswith("hint: ")


def test_a_closed_pipe_ends_quietly(tmp_path: Path) -> None:
    command = f"{sys.executable} -c '{PROGRAM}' recipes show demo | head -c 1"
    ended = subprocess.run(
        command, shell=True, capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert ended.stderr == ""


def test_a_fault_of_ours_is_one_line_unless_debugged(
    vdcompress: Vdcompress, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise ZeroDivisionError("first line\nsecond line")

    monkeypatch.setattr("vdcompress.recipe.shipped", fail)
    ended = vdcompress("recipes")
    assert ended.code == 1
    assert ended.err.splitlines() == [
        "error: ZeroDivisionError: first line",
        "hint: a fault of ours: run again with --debug",
    ]
