"""Perplexity of the original models with transformers' own quantised caches: quanto and HQQ.

    VDCOMPRESS_STANDINS=... python bench/peer_caches.py pythia-70m-standin

Both from their own packages (``pip install optimum-quanto hqq``), by transformers' QuantizedCache
with its defaults: groups of 64 numbers, the newest 128 tokens exact. A window is read a few tokens
at a time, so that all but the newest are read back from the cache. Bytes are those of 2048 tokens,
counted where they lie. A row is saved as soon as it is there; what the file has is not made again.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import record
import standins
import token_sets
import torch
from bits_frontier import MEASURED
from torch.nn import functional
from transformers.cache_utils import QuantizedCache

from vdcompress.cache_kinds import stored_nbytes
from vdcompress.decode_speed import cache_argument
from vdcompress.load import load

AXES = {"quanto": 0, "hqq": 1}
BITS = (4, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=("llama-32m-standin", "pythia-70m-standin"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--windows", type=int, default=token_sets.WINDOWS)
    parser.add_argument("--only", default="", help="keep the rows whose names hold this")
    parser.add_argument("--chunk", type=int, default=64, help="tokens that are read at a time")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    model = load(standins.model(options.model), device=options.device).model.eval()
    sets = token_sets.read()
    name = f"peer-caches-{options.model}"
    body: dict[str, Any] = {"model": options.model, "windows": options.windows}
    body |= {"chunk": options.chunk, "rows": record.earlier_rows(name, out=options.out)}
    there = {row["cache"] for row in body["rows"]}
    for backend, axis in AXES.items():
        for bits in BITS:
            row_name = f"{backend} int{bits}"
            if row_name in there or options.only not in row_name:
                continue

            def make(backend: str = backend, axis: int = axis, bits: int = bits) -> QuantizedCache:
                axes = {"axis_key": axis, "axis_value": axis}
                return QuantizedCache(backend, model.config, nbits=bits, **axes)

            found = {
                text: measured(model, make, sets[text], options.windows, options.chunk)
                for text in MEASURED
            }
            row = {
                "cache": row_name,
                "bytes_per_token": bytes_per_token(model, make, options.chunk),
            }
            body["rows"].append(row | {"texts": found, "environment": record.environment()})
            figures = " / ".join(f"{text['perplexity']:.3f}" for text in found.values())
            print(row_name, row["bytes_per_token"], figures, flush=True)
            record.write(name, body, out=options.out)


@torch.inference_mode()
def measured(
    model: Any, make: Any, tokens: torch.Tensor, windows: int, chunk: int
) -> dict[str, Any]:
    """Return the perplexity of a text."""
    size, loss, count = token_sets.WINDOW, 0.0, 0
    used = tokens[: windows * size + 1].to(model.device)
    for start in range(0, len(used) - 1, size):
        ids = used[start : start + size + 1]
        given = {cache_argument(model): make(), "use_cache": True}
        for low in range(0, len(ids) - 1, chunk):
            part = ids[low : low + chunk + 1]
            logits = model(input_ids=part[None, :-1], **given).logits[0].float()
            loss += functional.cross_entropy(logits, part[1:], reduction="sum").item()
        count += len(ids) - 1
    return {"perplexity": math.exp(loss / count), "tokens": count}


def bytes_per_token(model: Any, make: Any, chunk: int) -> float:
    """Return what 2048 tokens take in a model of 16 bits, by putting so many random ones there."""
    cache, config = make(), model.config
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    shape = (1, heads, chunk, config.hidden_size // config.num_attention_heads)
    for layer in range(config.num_hidden_layers):
        for _ in range(token_sets.WINDOW // chunk):
            numbers = torch.randn(shape, device=model.device, dtype=torch.bfloat16)
            cache.update(numbers, numbers, layer)
    return stored_nbytes(cache, token_sets.WINDOW)[0] / token_sets.WINDOW


if __name__ == "__main__":
    main()
