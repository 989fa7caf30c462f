"""Write one benchmark's results as JSON, with what is needed to repeat it."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import torch
import transformers

RESULTS = Path(__file__).parent / "results"


def write(name: str, body: dict[str, Any], *, out: Path | None = None) -> Path:
    """Write ``<name>.json`` into ``bench/results`` (or ``out``) and return its path."""
    path = (out or RESULTS) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**body, "environment": environment()}, indent=1) + "\n")
    return path


def earlier_rows(name: str, *, out: Path | None = None) -> list[dict[str, Any]]:
    """Return the rows that ``<name>.json`` has already, none if there is no such file."""
    path = (out or RESULTS) / f"{name}.json"
    if not path.exists():
        return []
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"]
    return rows


def environment() -> dict[str, Any]:
    """Return versions, device, processor, threads, date and commit."""
    cuda = torch.cuda.is_available()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name() if cuda else platform.machine(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "date": time.strftime("%Y-%m-%d"),
        **_state(),
    }


def _state() -> dict[str, Any]:
    """Return the commit and whether files differ from it; a copy of a checkout is told which."""
    given = os.environ.get("VDCOMPRESS_COMMIT")
    if given:
        return {"commit": given, "dirty": False}
    changed = bool(_git("status", "--porcelain", "--untracked-files=no"))
    return {"commit": _git("rev-parse", "--short", "HEAD"), "dirty": changed}


def _processor() -> str:
    """Return its name, the vectors that torch uses there, and whether it has tiles."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    found = dict(line.split(":", 1) for line in lines if ":" in line)
    known = {key.strip(): value.strip() for key, value in found.items()}
    name = known.get("model name") or platform.processor() or platform.machine()
    number = f", model {known['model']}" if "model" in known else ""
    tiles = ", AMX" if "amx_tile" in known.get("flags", "") else ""
    return f"{name}{number}, {torch.backends.cpu.get_cpu_capability()}{tiles}"


def _git(*words: str) -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
