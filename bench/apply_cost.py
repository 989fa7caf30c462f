"""Time and memory of ``apply``: 64 windows of 2048 tokens on the CPU.

    VDCOMPRESS_STANDINS=... python bench/apply_cost.py

Time: calibration and plain forward passes of the same body over the same windows take turns,
eight windows each, so that a busy machine slows both alike; rewriting is added to calibration.
Memory: the peak of one whole ``vdcompress apply`` in a process of its own, evaluation included,
above what its imports take.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import record
import standins
import torch
from training_free import calibration_windows

from vdcompress.calibrate import calibrate
from vdcompress.load import Base, load
from vdcompress.plan import make_plan
from vdcompress.rewrite import needed_statistics, rewrite

TURN = 8
MODEL = "pythia-70m-standin"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--skip", choices=("time", "memory"), nargs="*", default=[])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    body: dict[str, Any] = {"model": MODEL, "samples": options.samples, "seq_len": 2048}
    if "memory" not in options.skip:
        body["memory"] = memory(options.samples)
        print(body["memory"], flush=True)
    if "time" not in options.skip:
        base = load(standins.model(MODEL))
        body["time"] = times(base, calibration_windows(base, options.samples, 0))
        print(body["time"], flush=True)
    print(record.write("apply-cost", body, out=options.out))


def times(base: Base, windows: torch.Tensor) -> dict[str, float]:
    """Return seconds of plain passes, calibration and rewriting, and the ratio that is bounded."""
    plan = make_plan(base.shape, v_dim=320)
    needs = needed_statistics(plan.start, base.shape, plan)
    forward(base, windows[:1])
    seconds = {"forward": 0.0, "calibrate": 0.0, "rewrite": 0.0}
    for turn in windows.split(TURN):
        start = time.perf_counter()
        forward(base, turn)
        middle = time.perf_counter()
        statistics = calibrate(base, turn, needs=needs)
        seconds["forward"] += middle - start
        seconds["calibrate"] += time.perf_counter() - middle
    start = time.perf_counter()
    rewrite(base, plan, statistics)
    seconds["rewrite"] = time.perf_counter() - start
    ratio = (seconds["calibrate"] + seconds["rewrite"]) / seconds["forward"]
    return {**seconds, "ratio": ratio, "bound": 1.5}


def forward(base: Base, windows: torch.Tensor) -> None:
    """Run the body, one window at a time, as calibration does."""
    with torch.inference_mode():
        for window in windows.split(1):
            base.model.base_model(window, use_cache=False)


def memory(samples: int) -> dict[str, float]:
    """Run ``vdcompress apply`` and return its peak memory in bytes beside the bound."""
    with tempfile.TemporaryDirectory() as folder:
        data = str(standins.training_text())
        program = Path(sys.executable).with_name("vdcompress")
        command = [str(program), "apply", str(standins.model(MODEL))]
        command += ["--v-dim", "320", "--data", data, "--samples", str(samples), "--json", "-q"]
        done = subprocess.run(
            [*command, "-o", str(Path(folder) / "run")], stdout=subprocess.PIPE, check=True
        )
    results = json.loads(done.stdout)
    environment, weights = results["environment"], 4 * results["parameters"]["base"]
    return {
        "peak_bytes": environment["peak_memory_bytes"],
        "after_imports_bytes": environment["start_memory_bytes"],
        "above_imports_bytes": environment["peak_memory_bytes"] - environment["start_memory_bytes"],
        "bound_bytes": 3 * weights + 300_000_000,
        "seconds": results["seconds"],
    }


if __name__ == "__main__":
    main()
