"""Perplexity of the original models with their cache in few bits: what a smaller cache must beat.

    VDCOMPRESS_STANDINS=... python bench/quantized_caches.py pythia-70m-standin --device cuda

Keys behind RoPE and values are rounded per token and head, scales and zero points counted; nothing
is calibrated or trained. Takes seconds per row on a GPU and minutes on 2 cores.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import record
import standins
import token_sets

from vdcompress.evaluate import Evaluation
from vdcompress.load import load
from vdcompress.quantized_reference import INT4, INT8, QuantizedCache, evaluate_quantized

CACHES = (INT8, QuantizedCache(8, 4), INT4, QuantizedCache(3, 3), QuantizedCache(2, 2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=("llama-32m-standin", "pythia-70m-standin"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    base = load(standins.model(options.model), device=options.device)
    sets = token_sets.read()
    texts = {name: sets[name] for name in standins.TEXTS}
    whole = 4 * base.shape.layers * base.shape.kv_dim
    body: dict[str, Any] = {
        "model": options.model,
        "windows": options.windows,
        "base": {"bytes_per_token": whole},
        "rows": [],
    }
    for cache in CACHES:
        found = {
            name: evaluate_quantized(base.model, ids, cache, windows=options.windows)
            for name, ids in texts.items()
        }
        size = cache.bytes_per_token(base.shape)
        row = {"cache": cache.name, "bytes_per_token": size, "share": size / whole}
        row["texts"] = {name: figures(quality) for name, quality in found.items()}
        body["rows"].append(row)
        body["base"]["texts"] = {
            name: {"perplexity": quality.base_perplexity, "tokens": quality.tokens}
            for name, quality in found.items()
        }
        print(cache.name, size, *(f"{q.perplexity:.2f}" for q in found.values()), flush=True)
    print(record.write(f"quantized-caches-{options.model}", body, out=options.out))


def figures(quality: Evaluation) -> dict[str, Any]:
    return {"perplexity": quality.perplexity, "ratio": quality.ratio, "kl": quality.kl}


if __name__ == "__main__":
    main()
