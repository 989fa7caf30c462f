"""The README: its tables come from results, its Python runs, its commands exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from typer.testing import CliRunner

from vdcompress.cli.app import COMMANDS, app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_tables_come_from_results() -> None:
    command = [sys.executable, str(ROOT / "bench" / "tables.py"), "--check"]
    assert subprocess.run(command, check=False).returncode == 0, "run: python bench/tables.py"


def test_the_library_block_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict[str, object] = {}
    exec(blocks[-1], names)
    assert names["plan"].reduction == 0.375  # type: ignore[attr-defined]


def test_every_command_is_named_and_every_named_one_exists() -> None:
    shell = "".join(re.findall(r"```sh\n(.*?)```", README, re.DOTALL))
    named = set(re.findall(r"vdcompress (\w+)", shell))
    assert {"apply", "demo"} <= named <= set(COMMANDS)
    shown = CliRunner().invoke(app, ["--help"]).output
    assert all(name in README and name in shown for name in COMMANDS)
