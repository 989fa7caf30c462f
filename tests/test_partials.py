"""What is under way has one writer, and nothing takes it from that one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from vdcompress.errors import RunError
from vdcompress.pipeline.partials import LOCK, claim, under_way

HOLDS = """
import sys, time
from pathlib import Path
from vdcompress.pipeline.partials import under_way

with under_way(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def test_one_program_writes_and_a_killed_one_does_not(tmp_path: Path) -> None:
    run, partial = tmp_path / "r", tmp_path / "r.partial"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(partial)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        for force in (False, True):
            with pytest.raises(RunError, match="written by another process"):
                claim(run, force=force)
        with pytest.raises(RunError, match="written by another process"), under_way(partial):
            pass
        assert (partial / LOCK).exists()
    finally:
        holder.kill()
        holder.wait()
    with pytest.raises(RunError, match="interrupted run"):
        claim(run, force=False)
    with pytest.raises(KeyboardInterrupt), under_way(partial):
        raise KeyboardInterrupt
    assert not partial.exists()
    with under_way(partial):
        assert (partial / LOCK).exists()
    assert not partial.exists()
    claim(run, force=True)


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(RunError, match="cannot write to"),
        under_way(tmp_path / "file" / "r.partial"),
    ):
        pass
