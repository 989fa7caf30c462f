"""Heal every setting that a user would choose, and measure on the texts that chose nothing.

    VDCOMPRESS_HEAL_TOKENS=... VDCOMPRESS_TOKENS=... VDCOMPRESS_STANDINS=... \\
        python bench/healing_targets.py --device cuda
    ... python bench/healing_targets.py --device cuda --rows v320,mqa192 --passes 7

At most ``--tokens`` tokens of training for each row. With ``--passes`` the whole training text is
read so many times, 14.8 million tokens each, up to ``--most`` tokens in all: seven passes are 103
million, so with the default the last one ends early, at 6.8. A row is saved as soon as it is there;
those that the file has with the same settings are not made again, others of the same name are
replaced.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import healing_data
import perplexity
import record
import standins
import token_sets
from healing_data import Starts

import healing
from healing import Trial
from vdcompress.heal import Healed
from vdcompress.load import load
from vdcompress.rounding import round_weights

Asked = dict[str, Any]
BY_LAYER = {"allocation": "layers"}
PYTHIA: Mapping[str, Asked] = {
    "v320": {"v_dim": 320},
    "v320-layers": {"v_dim": 320, **BY_LAYER},
    "kv320": {"v_dim": 320, "k_dim": 320},
    "kv320-layers": {"v_dim": 320, "k_dim": 320, **BY_LAYER},
    "kv256": {"v_dim": 256, "k_dim": 256},
    "kv256-layers": {"v_dim": 256, "k_dim": 256, **BY_LAYER},
    "mqa192": {"v_dim": 192, "k_dim": 192, "groups": 1},
    "mqa192-layers": {"v_dim": 192, "k_dim": 192, "groups": 1, **BY_LAYER},
    "mqa128-r32": {"v_dim": 128, "k_dim": 128, "k_rotary_dim": 32, "groups": 1},
    "mqa128": {"v_dim": 128, "k_dim": 128, "groups": 1},
    "mqa128-layers": {"v_dim": 128, "k_dim": 128, "groups": 1, **BY_LAYER},
}
BITS: Mapping[str, Asked] = {
    f"bits-{share:g}": {"kv_budget": share, "bits": "auto"} for share in (0.19, 0.145, 0.105, 0.072)
}
LLAMA: Mapping[str, Asked] = {
    "kv80": {"v_dim": 80, "k_dim": 80},
    "kv80-layers": {"v_dim": 80, "k_dim": 80, **BY_LAYER},
    "mqa80": {"v_dim": 80, "k_dim": 80, "groups": 1},
    "kv64": {"v_dim": 64, "k_dim": 64},
    "kv64-layers": {"v_dim": 64, "k_dim": 64, **BY_LAYER},
    "mqa64": {"v_dim": 64, "k_dim": 64, "groups": 1},
}
MODELS = {"pythia-70m-standin": PYTHIA, "llama-32m-standin": LLAMA}
KEPT = {"twice": True}  # what rows without the word were made with
GOALS: Mapping[str, tuple[float, float, float]] = {
    "v320": (45.25, 11.84, 202.0),
    "kv320": (45.80, 12.05, 205.0),
    "kv256": (46.3, 12.4, 212.0),
    "mqa192": (45.30, 11.82, 200.0),
    "mqa128": (45.9, 11.95, 204.0),
}


def main() -> None:
    options = _options()
    rows = BITS if options.bits else MODELS[options.model]
    names = options.rows.split(",") if options.rows else list(rows)
    trial = trial_of(options)
    base = load(standins.model(options.model), device=options.device)
    starts = Starts.of(base, options.calibration)
    kind = "-long" if options.passes else "-bits" if options.bits else ""
    name = options.name or f"healing-targets-{options.model}{kind}"
    body: dict[str, Any] = {
        "model": options.model,
        "windows": options.windows,
        "calibration": options.calibration,
        "base_bytes_per_token": starts.plan(rows[names[0]]).base_bytes_per_token,
        "base": perplexity.measure_all(base, None, starts.sets, options.windows),
        "rows": record.earlier_rows(name, out=options.out),
    }
    print("base", perplexity.line(body["base"]), flush=True)
    for row_name in names:
        head = {"name": row_name, "asked": rows[row_name], **ways(trial, options)}
        if any(same(row, head) for row in body["rows"]):
            print(f"{row_name}: is there", flush=True)
            continue
        row = head | healed_row(starts, rows[row_name], trial, options)
        body["rows"] = [r for r in body["rows"] if r["name"] != row_name] + [row]
        path = record.write(name, body, out=options.out)
        print(line(row), flush=True)
        print(path, flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=sorted(MODELS), default="pythia-70m-standin")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", default="", help="names, with commas; all by default")
    parser.add_argument("--bits", action="store_true", help="the rows whose latents are rounded")
    parser.add_argument("--tokens", type=int, default=10_000_000)
    parser.add_argument("--passes", type=int, help="over the whole text, in place of --tokens")
    parser.add_argument("--most", type=int, default=100_000_000, help="tokens of all passes")
    parser.add_argument("--trial", choices=list(healing.EVERY), default="middle")
    parser.add_argument("--set", default="", help="change its settings: name=value,...")
    parser.add_argument("--length", type=int, help="tokens of a window; that of the trial")
    parser.add_argument("--windows", type=int, default=token_sets.WINDOWS)
    parser.add_argument("--calibration", default=token_sets.CALIBRATION)
    parser.add_argument("--name")
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def trial_of(options: argparse.Namespace) -> Trial:
    """Return how to heal; several epochs share the tokens."""
    trial = healing.EVERY[options.trial]
    settings = replace(trial.settings, **healing.changed(options.set))
    length = options.length or trial.length
    if not options.passes:
        return replace(trial, settings=settings, length=length, share=1 / settings.epochs)
    passes = options.passes
    most = max(options.most // (settings.batch_size * length), 1)
    settings = replace(settings, epochs=passes, patience=passes, max_steps=most)
    return Trial(settings, length, before=trial.before)


def ways(trial: Trial, options: argparse.Namespace) -> dict[str, Any]:
    """Return what makes a row's healing what it is."""
    before = trial.before and [asdict(trial.before[0]), trial.before[1]]
    return {
        "trial": options.trial,
        "settings": asdict(trial.settings),
        "before": before,
        "length": trial.length,
        "balance": trial.balance,
        "twice": trial.twice,
        "tokens": None if options.passes else options.tokens,
        "passes": options.passes,
    }


def same(row: dict[str, Any], head: dict[str, Any]) -> bool:
    """Say whether a row was made in the way that is asked for."""
    return all(row.get(key, KEPT.get(key)) == value for key, value in head.items())


def healed_row(
    starts: Starts, asked: Asked, trial: Trial, options: argparse.Namespace
) -> dict[str, Any]:
    """Compress, measure, heal, round as the product saves it, and measure again."""
    plan = starts.plan(asked)
    start = starts.student(asked)
    student = copy.deepcopy(start)
    round_weights(start, starts.base.dtype)

    def measured(model: Any) -> dict[str, Any]:
        return perplexity.measure_all(starts.base, model, starts.sets, options.windows)

    row = {
        "bytes_per_token": plan.bytes_per_token,
        "reduction": plan.reduction,
        "start": starts.held_out(start),
        "training_free": measured(start),
    }
    healed = _heal(starts, student, trial, options)
    round_weights(student, starts.base.dtype)
    end = {"end": starts.held_out(student), "healed": measured(student)}
    return row | end | healing.course(healed)


def _heal(starts: Starts, student: Any, trial: Trial, options: argparse.Namespace) -> Healed:
    if not options.passes:
        return healing.run(starts, student, trial, options.tokens)
    if trial.before is not None:
        raise SystemExit("whole passes are made in one phase")
    whole = len(healing_data.tokens("train"))
    return healing.once(starts, student, trial, whole)


def line(row: dict[str, Any]) -> str:
    """Return a row's figures for the eye."""
    change = f"{perplexity.line(row['training_free'])} -> {perplexity.line(row['healed'])}"
    goal = goal_of(row["name"])
    wanted = "" if goal is None else f", goal {' / '.join(map(str, goal))}"
    val = " ".join(f"{epoch['val_ppl']:.3f}" for epoch in row["epochs"])
    seen = f"{row['tokens_seen'] / 1e6:.2f}M tokens, {row['seconds']:.0f} s"
    val = f"val {row['start']['val_ppl']:.3f} -> {val}"
    return f"{row['name']}: {change}{wanted} | {val} | best {row['best_epoch']}, {seen}"


def goal_of(name: str) -> tuple[float, float, float] | None:
    """Return the perplexities that a row of this name is to reach."""
    found = [goal for key, goal in GOALS.items() if name == key or name.startswith(f"{key}-")]
    return found[0] if found else None


if __name__ == "__main__":
    main()
