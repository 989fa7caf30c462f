"""Run vLLM engines one after another in a process of their own: a JSON job in, JSON lines out.

python vllm_engine.py JOB.json ANSWERS.jsonl

vLLM changes the classes of transformers in place, so nothing else is computed here. A job is a list
of runs; each has ``model``, ``options`` of ``vllm.LLM``, ``prompts`` (token ids), ``new`` (how many
tokens each prompt is continued by) and ``rounds``.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

OPTIONS = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 256,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 64,
    "block_size": 32,
    "enable_prefix_caching": True,
    "disable_log_stats": True,
}


def main(job: Path, answers: Path) -> None:
    from vllm.distributed import cleanup_dist_env_and_memory

    with answers.open("w") as out:
        for run in json.loads(job.read_text()):
            try:
                answer = serve(run)
            except Exception as error:  # said to the test, which knows what it expects
                answer = {"error": " ".join(str(error).split())}
            out.write(json.dumps(answer) + "\n")
            out.flush()
            gc.collect()
            cleanup_dist_env_and_memory()


def serve(run: dict[str, Any]) -> dict[str, Any]:
    """Start an engine, let it answer every round, and say what its cache holds."""
    from vllm import LLM, SamplingParams

    began = time.perf_counter()
    engine = LLM(model=run["model"], **OPTIONS | run["options"])
    started = time.perf_counter()
    config = engine.llm_engine.vllm_config.cache_config
    prompts = [{"prompt_token_ids": ids} for ids in run["prompts"]]
    greedy = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in run["new"]]
    rounds = []
    for _ in range(run["rounds"]):
        outputs = engine.generate(prompts, greedy, use_tqdm=False)
        rounds.append(
            {
                "tokens": [list(output.outputs[0].token_ids) for output in outputs],
                "cached": [output.num_cached_tokens for output in outputs],
            }
        )
    return {
        "rounds": rounds,
        "tokens_in_cache": config.num_gpu_blocks * config.block_size,
        "block": config.block_size,
        "backend": backend(engine),
        "start_seconds": round(started - began, 2),
        "answer_seconds": round(time.perf_counter() - started, 2),
    }


def backend(engine: Any) -> str:
    """Return the names of the attention backends in use, and of the model's class."""
    found: list[list[str]] = engine.collective_rpc(names)
    return " ".join(found[0])


def names(worker: Any) -> list[str]:
    """Run in a worker: name its model's class and its layers' backends."""
    context = worker.model_runner.vllm_config.compilation_config.static_forward_context
    backends = {layer.get_attn_backend().get_name() for layer in context.values()}
    return [type(worker.model_runner.model).__name__, *sorted(backends)]


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
