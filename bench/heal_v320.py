"""Finetune the V-320 model by distillation: several settings, the best chosen on held-out text.

    VDCOMPRESS_STANDINS=... python bench/heal_v320.py --device cuda

10,000 sequences of 128 tokens of the training text, early stopping with patience 1. Settings are
compared on the validation part of the training text; the three texts that measure are read once
for each setting and choose nothing.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import record
import standins
import torch
from training_free import calibration_windows, evaluation_tokens, measure

from vdcompress.calibrate import calibrate
from vdcompress.data.corpus import Source, documents
from vdcompress.data.windows import draw_windows
from vdcompress.heal import HealSettings, heal
from vdcompress.load import Base, load
from vdcompress.plan import make_plan
from vdcompress.rewrite import rewrite
from vdcompress.rounding import round_weights

BASIC = HealSettings(
    epochs=6,
    learning_rate=2e-4,
    warmup_ratio=0.01,
    train="attention",
    hidden_weight=0.0,
    schedule="cosine",
)
TRIALS = {
    "batch 32, lr 2e-4": BASIC,
    "batch 32, lr 1e-4": replace(BASIC, learning_rate=1e-4),
    "batch 32, lr 5e-4": replace(BASIC, learning_rate=5e-4),
    "batch 8, lr 1e-4": replace(BASIC, batch_size=8, learning_rate=1e-4),
    "batch 64, lr 5e-4": replace(BASIC, batch_size=64, learning_rate=5e-4),
    "batch 32, all parameters, lr 1e-4": replace(
        BASIC, train="all", body_rate=1.0, learning_rate=1e-4
    ),
    "batch 32, cross-entropy, lr 1e-4": replace(BASIC, distill=False, learning_rate=1e-4),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--trials", nargs="*", default=list(TRIALS))
    parser.add_argument("--name", default="heal-v320")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    base = load(standins.model("pythia-70m-standin"), device=options.device)
    training, validation = (
        heal_windows(base, role, count)
        for role, count in (("training", options.samples), ("validation", 500))
    )
    texts = {name: evaluation_tokens(base, name, options.windows) for name in standins.TEXTS}
    plan = make_plan(base.shape, v_dim=320)
    statistics = calibrate(base, calibration_windows(base, 64, 0))
    body: dict[str, Any] = {
        "model": "pythia-70m-standin",
        "v_dim": 320,
        "sequences": options.samples,
        "seq_len": 128,
        "validation_sequences": len(validation),
        "base": {n: measure(base, None, ids, options.windows) for n, ids in texts.items()},
        "rows": [],
    }
    start = rewrite(base, plan, statistics)
    body["training_free"] = {
        n: measure(base, start, ids, options.windows) for n, ids in texts.items()
    }
    for name in options.trials:
        model = rewrite(base, plan, statistics)
        row = trial(base, model, training, validation, TRIALS[name])
        row["texts"] = {n: measure(base, model, ids, options.windows) for n, ids in texts.items()}
        body["rows"].append({"name": name, **row})
        figures = " / ".join(f"{t['perplexity']:.2f}" for t in row["texts"].values())
        epochs = f"best epoch {row['best_epoch']} of {len(row['epochs'])}"
        print([(round(e["train_ppl"], 3), round(e["val_ppl"], 3)) for e in row["epochs"]])
        change = f"val {row['initial_val_ppl']:.3f} -> {row['best_val_ppl']:.3f}"
        print(f"{name}: {change}, {epochs}, {figures}, {row['seconds']:.0f} s", flush=True)
    body["best"] = min(body["rows"], key=lambda row: row["best_val_ppl"])["name"]
    print(record.write(options.name, body, out=options.out))


def heal_windows(base: Base, role: Any, count: int) -> torch.Tensor:
    """Draw sequences of 128 tokens from one part of the training text."""
    text = documents(Source.parse(str(standins.training_text())), role)
    return draw_windows(text, base.tokenizer, count=count, length=128, seed=1)


def trial(
    base: Base, model: Any, training: torch.Tensor, validation: torch.Tensor, settings: HealSettings
) -> dict[str, Any]:
    """Heal one model in place, round it as it would be saved, and return what happened."""
    with tempfile.TemporaryDirectory() as folder:
        healed = heal(
            model, base.model, training, validation, settings, checkpoints=Path(folder) / "run"
        )
    round_weights(model, base.dtype)
    return {
        "settings": asdict(settings),
        "initial_val_ppl": healed.initial_val_ppl,
        "best_val_ppl": healed.best_val_ppl,
        "best_epoch": healed.best_epoch,
        "tokens": healed.tokens_seen,
        "seconds": healed.seconds,
        "epochs": [asdict(epoch) for epoch in healed.history],
    }


if __name__ == "__main__":
    main()
