"""Peak memory of ``apply`` on a checkpoint that is larger than it may hold, on the CPU.

    python bench/large_model.py [--folder /tmp]

A random Llama of the width of Llama 3.2 1B and more than twice its layers, 4.5 GB in bfloat16, is
written shard by shard, then compressed with ``--max-memory 2GB`` in a process of its own:
calibrated and rewritten layer by layer, and compared with the base from the written shards. The
peak is of all that the process holds, imports and pages of mapped files too; ``RssAnon``, which no
file backs, is sampled beside it. Everything written is removed at the end.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from importlib import resources
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import record
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from vdcompress.load import TOKENIZER_FILES
from vdcompress.shards import ShardWriter

MAX_MEMORY = 2_000_000_000
SEQ_LEN, WINDOWS = 256, 4
ROWS = 4096
WIDTHS = {
    "vocab_size": 128_256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "head_dim": 64,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--heads", type=int, default=16, help="the calibration grows with them")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    config = LlamaConfig(
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.heads // 4,
        dtype="bfloat16",
        **WIDTHS,
    )
    model = on_meta(config)
    size = 2 * sum(parameter.numel() for parameter in model.parameters())
    if 2 * size <= MAX_MEMORY:
        sys.exit("so few layers fit into memory: apply would hold them all")
    if shutil.disk_usage(options.folder).free < 2.5 * size:
        sys.exit(f"{options.folder} has no room for twice {size / 1e9:.1f} GB: name another")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        start = time.perf_counter()
        # in a process of its own: a process that is started begins with its parent's peak
        maker = get_context("spawn").Process(
            target=make_checkpoint, args=(config, Path(folder) / "base")
        )
        maker.start()
        maker.join()
        if maker.exitcode:
            sys.exit("the checkpoint could not be written")
        print(f"{size / 1e9:.2f} GB written in {time.perf_counter() - start:.0f} s", flush=True)
        body = measure(Path(folder), size, options.heads)
    print(json.dumps(body, indent=1), flush=True)
    print(record.write("large-model", body, out=options.out))


def on_meta(config: LlamaConfig) -> Any:
    """Build the model without its memory."""
    with torch.device("meta"):
        return LlamaForCausalLM(config)


def make_checkpoint(config: LlamaConfig, folder: Path) -> None:
    """Write random weights, a few rows at a time, and the demo's tokenizer."""
    model = on_meta(config)
    folder.mkdir()
    draw = torch.Generator().manual_seed(0)
    tensors = {n: p for n, p in model.state_dict().items() if n != "lm_head.weight"}
    with ShardWriter(folder, tensors, torch.bfloat16, "1GB") as writer:
        for name, tensor in tensors.items():
            if tensor.dim() == 1:
                writer.write(name, torch.ones(tensor.shape))
                continue
            for start in range(0, len(tensor), ROWS):
                shape = (min(ROWS, len(tensor) - start), tensor.shape[1])
                writer.write(name, 0.02 * torch.randn(shape, generator=draw), start)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    for name in TOKENIZER_FILES:
        source = resources.files("vdcompress.demo_model") / name
        if source.is_file():
            (folder / name).write_bytes(source.read_bytes())


def measure(folder: Path, size: int, heads: int) -> dict[str, Any]:
    """Compress ``folder/base`` in a process of its own and watch its memory."""
    samples = 4 * heads * WIDTHS["head_dim"] // SEQ_LEN  # the fewest tokens that calibrate
    recipe = {
        "version": 1,
        "model": str(folder / "base"),
        "plan": {"v_dim": heads // 4 * 40},
        "calibration": {"data": "stdlib", "samples": samples, "seq_len": SEQ_LEN},
        "evaluation": {"windows": WINDOWS, "seq_len": SEQ_LEN},
    }
    (folder / "large.yaml").write_text(json.dumps(recipe))
    program = Path(sys.executable).with_name("vdcompress")
    command = [str(program), "apply", "--recipe", str(folder / "large.yaml"), "--json", "-q"]
    command += ["-o", str(folder / "run"), "--max-memory", str(MAX_MEMORY)]
    with tempfile.TemporaryFile() as out, subprocess.Popen(command, stdout=out) as process:
        sampled = 0
        while process.poll() is None:
            sampled = max(sampled, anonymous_bytes(process.pid))
            time.sleep(0.05)
        if process.returncode:
            sys.exit(f"apply ended with {process.returncode}")
        out.seek(0)
        results = json.loads(out.read())
    environment = results["environment"]
    states = 4 * samples * SEQ_LEN * WIDTHS["hidden_size"]
    return {
        "checkpoint_bytes": size,
        "parameters": results["parameters"],
        "calibration": {"samples": samples, "seq_len": SEQ_LEN},
        "max_memory_bytes": MAX_MEMORY,
        "hidden_states_bytes": states,
        "peak_bytes": environment["peak_memory_bytes"],
        "peak_anonymous_bytes": sampled,
        "bound_bytes": MAX_MEMORY + states,
        "perplexity": results["perplexity"],
        "kv_cache": results["kv_cache"],
        "seconds": results["seconds"],
    }


def anonymous_bytes(process: int) -> int:
    """Return the memory of a process that no file backs, 0 where that cannot be read."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    found = [line.split()[1] for line in lines if line.startswith("RssAnon:")]
    return 1024 * int(found[0]) if found else 0


if __name__ == "__main__":
    main()
