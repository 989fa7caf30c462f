"""Requests under load: vLLM on the CPU with a fixed memory for its cache, base against compressed.

    VDCOMPRESS_STANDINS=... python bench/serving_load.py

Needs vLLM's CPU build in this environment. All requests arrive at once; the engine admits as many
as its cache holds and queues the others. Each case is one engine in a process of its own, fed in
that process: nothing listens anywhere. The compressed models are made here, from few windows: how
well they say it does not matter to how fast.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import record
import standins

MODEL = "pythia-70m-standin"
LAYOUTS: dict[str, dict[str, int]] = {
    "base": {},
    "2 x 128/128": {"v_dim": 256, "k_dim": 256, "groups": 2},
    "1 x 192/192": {"v_dim": 192, "k_dim": 192, "groups": 1},
}
CACHES = ("auto", "fp8")
MIB = 24
REQUESTS, PROMPT, NEW = 64, 144, 48
LONGEST = 900  # seconds that one case may take


@dataclass
class Load:
    """What was seen while the engine worked through the requests."""

    most_running: int = 0
    most_waiting: int = 0
    steps: int = 0
    preemptions: dict[str, int] | None = None

    def look(self, scheduler: Any) -> None:
        """Note one step."""
        self.steps += 1
        self.most_running = max(self.most_running, len(scheduler.running))
        self.most_waiting = max(self.most_waiting, len(scheduler.waiting))
        seen = self.preemptions = self.preemptions or {}
        seen |= {r.request_id: r.num_preemptions for r in scheduler.running}


def prompts(tokenizer: Any) -> list[list[int]]:
    """Return slices of held-out novels that share no beginning."""
    lines = standins.text("books_dev").read_text(encoding="utf-8").splitlines()
    text = "".join(json.loads(line)["text"] for line in lines[:4])[: 12 * REQUESTS * PROMPT]
    ids = tokenizer(text)["input_ids"]
    return [ids[start : start + PROMPT] for start in range(0, REQUESTS * PROMPT, PROMPT)]


def serve(folder: str, cache: str) -> dict[str, Any]:
    """Send every request to one engine and count."""
    from transformers import AutoTokenizer
    from vllm import LLM, SamplingParams

    asked = prompts(AutoTokenizer.from_pretrained(folder))
    engine: Any = LLM(
        model=folder,
        dtype="bfloat16",
        kv_cache_dtype=cache,
        kv_cache_memory_bytes=MIB * 2**20,
        enforce_eager=True,
        max_model_len=256,
        max_num_seqs=2 * REQUESTS,
        max_num_batched_tokens=512,
        enable_prefix_caching=False,
        block_size=32,
    ).llm_engine
    greedy = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True)
    for number, ids in enumerate(asked):
        engine.add_request(str(number), {"prompt_token_ids": ids}, greedy)
    load = Load()
    scheduler = engine.engine_core.engine_core.scheduler
    began, worked = time.perf_counter(), time.process_time()
    while engine.has_unfinished_requests():
        if time.perf_counter() - began > LONGEST:
            raise TimeoutError(f"{folder} took longer than {LONGEST} s")
        engine.step()
        load.look(scheduler)
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - worked
    config = engine.vllm_config.cache_config
    return {
        "tokens_in_cache": config.num_gpu_blocks * config.block_size,
        "most_running": load.most_running,
        "most_waiting": load.most_waiting,
        "steps": load.steps,
        "preemptions": sum((load.preemptions or {}).values()),
        "seconds": round(seconds, 2),
        "cpu_seconds": round(cpu_seconds, 2),
        "tokens_per_second": round(REQUESTS * NEW / seconds, 1),
        "tokens_per_cpu_second": round(REQUESTS * NEW / cpu_seconds, 1),
    }


def make(asked: dict[str, int], base: Any, statistics: Any, folder: Path) -> Path:
    """Write a compressed model."""
    import vdcompress as vd
    from vdcompress.artifact import write_artifact
    from vdcompress.gains import gains

    plan = vd.plan_for(base.shape, vd.Request.of(**asked), gains=gains(base.shape, statistics))
    model = vd.rewrite(base, plan, statistics)
    return write_artifact(folder, vd.Compressed.of(base, plan, model))


def folders(made: Path) -> dict[str, Path]:
    """Return the folder of every layout."""
    import vdcompress as vd
    from vdcompress.calibrate import EVERYTHING
    from vdcompress.data.corpus import Source, documents
    from vdcompress.data.windows import draw_windows

    source = standins.model(MODEL)
    base = vd.load(source)
    windows = draw_windows(
        documents(Source.parse("stdlib"), "training"), base.tokenizer, count=16, length=256, seed=0
    )
    statistics = vd.calibrate(base, windows, needs=EVERYTHING, batch=4)
    return {
        name: make(asked, base, statistics, made / name.replace("/", "-")) if asked else source
        for name, asked in LAYOUTS.items()
    }


def in_a_process(folder: Path, cache: str) -> dict[str, Any]:
    """Run one case in a fresh process and return what it printed last."""
    environment = os.environ | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, __file__, "--case", str(folder), cache]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment, timeout=2 * LONGEST
    )
    if done.returncode:
        sys.exit(done.stderr[-4000:])
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", nargs=2, metavar=("FOLDER", "CACHE"), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(serve(*options.case)))
        return
    from importlib.metadata import version

    body: dict[str, Any] = {
        "model": MODEL,
        "vllm": version("vllm-cpu"),
        "backend": "CPU_ATTN, bfloat16, eager",
        "cache_mib": MIB,
        "requests": REQUESTS,
        "prompt_tokens": PROMPT,
        "new_tokens": NEW,
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "rows": [],
    }
    with tempfile.TemporaryDirectory() as made:
        for name, folder in folders(Path(made)).items():
            for cache in CACHES:
                row = {"layout": name, "cache": cache} | in_a_process(folder, cache)
                body["rows"].append(row)
                print(row, flush=True)
    print(record.write("serving-load", body, out=options.out))


if __name__ == "__main__":
    main()
