"""Find the best way to heal: one change at a time from a middle point, at equal tokens.

    VDCOMPRESS_STANDINS=... VDCOMPRESS_HEAL_TOKENS=... python bench/healing.py --device cuda

Choices are made by perplexity and divergence on the validation part of the training text. The three
texts that measure are not read here.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import healing_data
import record
import standins
from healing_data import Starts

from vdcompress.heal import Healed, HealSettings, heal
from vdcompress.load import load

MODEL = "pythia-70m-standin"
PLANS: Mapping[str, dict[str, Any]] = {
    "kv320": {"v_dim": 320, "k_dim": 320},
    "mqa192": {"v_dim": 192, "k_dim": 192, "groups": 1},
}
MIDDLE = HealSettings(
    epochs=1,
    learning_rate=5e-4,
    batch_size=16,
    warmup_ratio=0.02,
    chunk_tokens=4096,
    train="attention",
    body_rate=1.0,
    hidden_weight=0.0,
    schedule="cosine",
)


@dataclass(frozen=True)
class Trial:
    """One way to heal.

    Attributes:
        settings: of the finetune.
        length: tokens of a window.
        share: of the tokens, how many are different; the rest are further passes.
        before: settings of a first phase, and its part of the tokens.
        balance: of the documents, as :func:`healing_data.windows` has it.
        twice: likewise.
    """

    settings: HealSettings = MIDDLE
    length: int = 1024
    share: float = 1.0
    before: tuple[HealSettings, float] | None = None
    balance: float = 1.0
    twice: bool = True


def _with(**changes: Any) -> Trial:
    return Trial(replace(MIDDLE, **changes))


LAYERS = replace(MIDDLE, target="layers")
TRIALS: dict[str, Trial] = {
    "middle": Trial(),
    "train latents": _with(train="latents"),
    "train body": _with(train="body"),
    "train all": _with(train="all"),
    "train all, embeddings at a tenth": _with(train="all", embeddings_rate=0.1),
    "train body, body at a third": _with(train="body", body_rate=1 / 3),
    "KL + 0.1 CE": _with(ce_weight=0.1),
    "KL + CE": _with(ce_weight=1.0),
    "CE": _with(distill=False),
    "KL + hidden states 0.1": _with(hidden_weight=0.1),
    "KL + hidden states": _with(hidden_weight=1.0),
    "hidden states": _with(kl_weight=0.0, hidden_weight=1.0),
    "KL at temperature 2": _with(temperature=2.0),
    "top 16 kept on disk": _with(teacher_top_k=16),
    "top 64 kept on disk": _with(teacher_top_k=64),
    "layers": Trial(LAYERS),
    "layers for a fifth, then KL": Trial(before=(LAYERS, 0.2)),
    "lr 1e-4": _with(learning_rate=1e-4),
    "lr 2e-4": _with(learning_rate=2e-4),
    "lr 1e-3": _with(learning_rate=1e-3),
    "lr 2e-3": _with(learning_rate=2e-3),
    "latents at twice the rate": _with(latents_rate=2.0),
    "linear": _with(schedule="linear"),
    "wsd": _with(schedule="wsd"),
    "constant": _with(schedule="constant"),
    "batch 4": _with(batch_size=4),
    "batch 8": _with(batch_size=8),
    "batch 32": _with(batch_size=32),
    "length 128": Trial(replace(MIDDLE, batch_size=128), length=128),
    "length 256": Trial(replace(MIDDLE, batch_size=64), length=256),
    "length 512": Trial(replace(MIDDLE, batch_size=32), length=512),
    "length 2048": Trial(replace(MIDDLE, batch_size=8), length=2048),
    "a quarter of the text, four passes": Trial(replace(MIDDLE, epochs=4, patience=4), share=0.25),
    "train all, a quarter of the text, four passes": Trial(
        replace(MIDDLE, train="all", epochs=4, patience=4), share=0.25
    ),
    "weight decay 0.1": _with(weight_decay=0.1),
    "no clipping": _with(max_grad_norm=0.0),
}

BOTH = replace(MIDDLE, hidden_weight=1.0, batch_size=64)
SHORT = replace(BOTH, batch_size=128)
COMBINATIONS: dict[str, Trial] = {
    "KL + hidden states, length 256": Trial(BOTH, 256),
    "KL + hidden states, length 128": Trial(SHORT, 128),
    "KL + 3 hidden states, length 256": Trial(replace(BOTH, hidden_weight=3.0), 256),
    "KL + hidden states, length 256, linear": Trial(replace(BOTH, schedule="linear"), 256),
    "KL + hidden states, length 256, lr 1e-3": Trial(replace(BOTH, learning_rate=1e-3), 256),
    "KL + hidden states, length 256, lr 3e-4": Trial(replace(BOTH, learning_rate=3e-4), 256),
    "KL + hidden states, length 256, a quarter of the text, four passes": Trial(
        replace(BOTH, epochs=4, patience=4), 256, share=0.25
    ),
    "KL + hidden states, length 256, body at a third": Trial(
        replace(BOTH, train="body", body_rate=1 / 3), 256
    ),
    "layers for a fifth, then KL + hidden states, length 256": Trial(
        BOTH, 256, before=(replace(LAYERS, batch_size=64), 0.2)
    ),
}
THIRD = replace(BOTH, hidden_weight=3.0, schedule="linear")
BODY = replace(THIRD, train="body", body_rate=1 / 3)
LAYERS_256 = replace(LAYERS, batch_size=64, schedule="linear")
SECOND_ROUND: dict[str, Trial] = {
    "KL + 3 hidden states, length 256, linear": Trial(THIRD, 256),
    "the same, 10 hidden states": Trial(replace(THIRD, hidden_weight=10.0), 256),
    "the same, 30 hidden states": Trial(replace(THIRD, hidden_weight=30.0), 256),
    "the same, body at a third": Trial(BODY, 256),
    "the same, body at a tenth": Trial(replace(BODY, body_rate=0.1), 256),
    "the same, 10 hidden states, body at a third": Trial(replace(BODY, hidden_weight=10.0), 256),
    "the same, lr 1e-3": Trial(replace(THIRD, learning_rate=1e-3), 256),
    "the same, 10 hidden states, lr 1e-3": Trial(
        replace(THIRD, hidden_weight=10.0, learning_rate=1e-3), 256
    ),
    "the same, 10 hidden states, lr 1e-3, body at a third": Trial(
        replace(BODY, hidden_weight=10.0, learning_rate=1e-3), 256
    ),
    "the same, batch 32": Trial(replace(THIRD, batch_size=32), 256),
    "layers for a fifth, then the same": Trial(THIRD, 256, before=(LAYERS_256, 0.2)),
    "layers for two fifths, then the same": Trial(THIRD, 256, before=(LAYERS_256, 0.4)),
}
BEST = replace(BODY, hidden_weight=10.0, learning_rate=1e-3)
THIRD_ROUND: dict[str, Trial] = {
    "KL + 10 hidden states, length 256, linear, lr 1e-3, body at a third": Trial(BEST, 256),
    "that, batch 32": Trial(replace(BEST, batch_size=32), 256),
    "that, batch 16": Trial(replace(BEST, batch_size=16), 256),
    "that, 30 hidden states": Trial(replace(BEST, hidden_weight=30.0), 256),
    "that, 30 hidden states, batch 32": Trial(
        replace(BEST, hidden_weight=30.0, batch_size=32), 256
    ),
    "that, lr 2e-3": Trial(replace(BEST, learning_rate=2e-3), 256),
    "that, body at the whole rate": Trial(replace(BEST, body_rate=1.0), 256),
    "that, embeddings at a thirtieth": Trial(
        replace(BEST, train="all", embeddings_rate=1 / 30), 256
    ),
    "layers for a fifth, then that": Trial(BEST, 256, before=(LAYERS_256, 0.2)),
    "that, batch 32, documents by their root": Trial(
        replace(BEST, batch_size=32), 256, balance=0.5
    ),
    "that, batch 32, every document alike": Trial(replace(BEST, batch_size=32), 256, balance=0.0),
}
LONGER = replace(BEST, batch_size=16, learning_rate=5e-4)
FOURTH_ROUND: dict[str, Trial] = {
    "16 windows of 512, lr 5e-4": Trial(LONGER, 512),
    "16 windows of 512, lr 5e-4, documents by their root": Trial(LONGER, 512, balance=0.5),
    "16 windows of 512, lr 5e-4, documents by their root, none twice": Trial(
        LONGER, 512, balance=0.5, twice=False
    ),
    "8 windows of 1024, lr 5e-4, documents by their root": Trial(
        replace(LONGER, batch_size=8), 1024, balance=0.5
    ),
}
EVERY = TRIALS | COMBINATIONS | SECOND_ROUND | THIRD_ROUND | FOURTH_ROUND


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, default=5_000_000)
    parser.add_argument("--plans", default=",".join(PLANS))
    parser.add_argument("--trials", default=";".join(EVERY))
    parser.add_argument("--set", default="", help="change the middle: name=value,...")
    parser.add_argument("--name", default="healing-ablation")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    starts = Starts.of(load(standins.model(MODEL), device=options.device))
    changes = changed(options.set)
    body: dict[str, Any] = {"model": MODEL, "tokens": options.tokens, "rows": []}
    for plan in options.plans.split(","):
        start = starts.student(PLANS[plan])
        before = starts.held_out(start)
        print(plan, before, flush=True)
        for name in options.trials.split(";"):
            trial = EVERY[name]
            trial = replace(trial, settings=replace(trial.settings, **changes))
            student = copy.deepcopy(start)
            healed = run(starts, student, trial, options.tokens)
            row = {"plan": plan, "trial": name, "settings": asdict(trial.settings)}
            row |= {"length": trial.length, "share": trial.share, "start": before}
            row |= {"end": starts.held_out(student), **course(healed)}
            body["rows"].append(row)
            figures = f"{row['end']['val_ppl']:.3f} kl {row['end']['val_kl']:.5f}"
            print(f"{plan} | {name}: {figures}, {healed.seconds:.0f} s", flush=True)
            path = record.write(options.name, body, out=options.out)
    print(path)


def changed(text: str) -> dict[str, Any]:
    """Read ``learning_rate=1e-3,train=all``."""
    found: dict[str, Any] = {}
    for item in filter(None, text.split(",")):
        name, value = item.split("=")
        kind = type(getattr(MIDDLE, name))
        found[name] = kind(value)
    return found


def run(starts: Starts, student: Any, trial: Trial, tokens: int) -> Healed:
    """Heal a student in place, in one phase or two."""
    rest = 1.0
    if trial.before is not None:
        settings, part = trial.before
        rest -= part
        once(starts, student, replace(trial, settings=settings), part * tokens)
    return once(starts, student, trial, rest * trial.share * tokens)


def once(starts: Starts, student: Any, trial: Trial, tokens: float) -> Healed:
    """Heal a student in place on so many different tokens."""
    with tempfile.TemporaryDirectory() as folder:
        return heal(
            student,
            starts.base.model,
            healing_data.windows(
                trial.length, int(tokens / trial.length), balance=trial.balance, twice=trial.twice
            ),
            healing_data.tokens("validation-1024"),
            trial.settings,
            checkpoints=Path(folder) / "run",
        )


def course(healed: Healed) -> dict[str, Any]:
    """Return what happened, for a row."""
    return {
        "epochs": [asdict(epoch) for epoch in healed.history],
        "best_epoch": healed.best_epoch,
        "initial_val_ppl": healed.initial_val_ppl,
        "tokens_seen": healed.tokens_seen,
        "seconds": healed.seconds,
    }


if __name__ == "__main__":
    main()
