"""Perplexity without any training: every initialiser, with and without repair, at many widths.

    VDCOMPRESS_STANDINS=... python bench/training_free.py pythia-70m-standin --device cuda

One calibration (on the training text), then one row for each start and width; the three texts
that measure are never calibrated on. Takes about a minute per row on 2 cores and a second on a GPU.
"""

from __future__ import annotations

import argparse
import gzip
import json
import time
from pathlib import Path
from typing import Any

import record
import standins
import torch

from vdcompress.calibrate import calibrate
from vdcompress.data.corpus import Source, documents, role_of
from vdcompress.data.windows import draw_windows, tokenise
from vdcompress.evaluate import evaluate
from vdcompress.load import Base, load
from vdcompress.plan import Start, make_plan
from vdcompress.rewrite import rewrite

STARTS = (
    Start("random", "none", 0),
    Start("svd", "none", 0),
    Start("pca", "none", 0),
    Start("optimal", "none", 0),
    Start("random", "local", 0),
    Start("svd", "local", 0),
    Start("pca", "local", 0),
    Start("optimal", "local", 0),
    Start("optimal", "local", 2),
    Start("optimal", "local", 4),
)
BALANCE = 0.5
WIDTHS = {
    "pythia-70m-standin": (448, 384, 320, 256, 192, 128),
    "llama-32m-standin": (112, 96, 80, 64),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=sorted(WIDTHS))
    parser.add_argument("--widths", type=lambda s: tuple(map(int, s.split(","))))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--balance", type=float, default=BALANCE)
    parser.add_argument("--name")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    base = load(standins.model(options.model), device=options.device)
    texts = {name: evaluation_tokens(base, name, options.windows) for name in standins.TEXTS}
    texts |= held_out_tokens(base, options.windows)
    calibration = calibration_windows(base, options.samples, options.seed, options.balance)
    started = time.perf_counter()
    statistics = calibrate(base, calibration)
    body: dict[str, Any] = {
        "model": options.model,
        "windows": options.windows,
        "calibration": {
            "data": "train.jsonl.gz",
            "samples": options.samples,
            "seq_len": calibration.shape[1],
            "seed": options.seed,
            "balance": options.balance,
            "seconds": time.perf_counter() - started,
        },
        "base": {name: measure(base, None, ids, options.windows) for name, ids in texts.items()},
        "rows": [],
    }
    for v_dim in options.widths or WIDTHS[options.model]:
        for start in STARTS:
            model = rewrite(base, make_plan(base.shape, v_dim=v_dim, start=start), statistics)
            row = {"v_dim": v_dim, **vars(start)}
            row["texts"] = {
                n: measure(base, model, ids, options.windows) for n, ids in texts.items()
            }
            body["rows"].append(row)
            figures = " / ".join(f"{t['perplexity']:.2f}" for t in row["texts"].values())
            print(v_dim, start.initializer, start.refit, start.alternate, figures, flush=True)
    print(record.write(options.name or f"training-free-{options.model}", body, out=options.out))


def calibration_windows(
    base: Base, samples: int, seed: int, balance: float = BALANCE
) -> torch.Tensor:
    """Draw windows of 2048 tokens from the training text."""
    text = documents(Source.parse(str(standins.training_text())), "training")
    return draw_windows(
        text, base.tokenizer, count=samples, length=2048, seed=seed, balance=balance
    )


def held_out_tokens(base: Base, windows: int, window: int = 2048) -> dict[str, torch.Tensor]:
    """Tokenise held-out parts of the training text, books and documents apart: to choose by."""
    texts: dict[str, list[str]] = {"held-out books": [], "held-out docs": []}
    with gzip.open(standins.training_text(), "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            if role_of(row["text"]) == "validation":
                texts[f"held-out {row['kind']}s"].append(row["text"][: 8 * window])
    return {
        name: tokenise(rows, base.tokenizer, limit=windows * window + 1)
        for name, rows in texts.items()
    }


def evaluation_tokens(base: Base, name: str, windows: int, window: int = 2048) -> torch.Tensor:
    """Tokenise the beginning of a text that is only for measuring."""
    text = documents(Source.parse(str(standins.text(name))), "evaluation", whole=True)
    return tokenise(text, base.tokenizer, limit=windows * window + 1)


def measure(base: Base, model: Any, ids: torch.Tensor, windows: int) -> dict[str, Any]:
    """Return perplexity of the model (of the base if None), ratio and KL on one text."""
    if model is None:
        found = evaluate(base.model, ids, windows=windows)
    else:
        found = evaluate(model, ids, base=base.model, windows=windows)
    return {
        "perplexity": found.perplexity,
        "ratio": found.ratio,
        "kl": found.kl,
        "tokens": found.tokens,
    }


if __name__ == "__main__":
    main()
