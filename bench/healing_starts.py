"""What a good start is worth: healing from the closed form, from pca, and from a random subspace.

    VDCOMPRESS_HEAL_TOKENS=... VDCOMPRESS_TOKENS=... VDCOMPRESS_STANDINS=... \\
        python bench/healing_starts.py --device cuda

All from the pretrained stand-in and distilled from it in the best way, on sequences of 128 tokens,
until validation gets no better. After 20 steps the rate is constant, so that an epoch is worth the
same whenever training stops. A step takes 128 sequences, 16,384 tokens. A row is saved as soon as
it is there; what the file has is not made again.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import healing_data
import record
import standins
import token_sets
from healing_data import Starts
from keys_and_groups import FISHER

import healing
from vdcompress.heal import Healed, HealSettings, heal
from vdcompress.load import load
from vdcompress.plan import Start

MODEL = healing.MODEL
NAME = "healing-starts"
PLANS: Mapping[str, dict[str, Any]] = {
    "V 320": {"v_dim": 320},
    "V 256": {"v_dim": 256},
    "V 384": {"v_dim": 384},
    "V 320, K 320": {"v_dim": 320, "k_dim": 320},
}
CLOSED_FORM = "closed form"
STARTS: Mapping[str, Start] = {
    CLOSED_FORM: FISHER,
    "pca": Start("pca", "none", 0),
    "random": Start("random", "none", 0),
}
SMALL, LARGE = 10_000, 100_000
ARRAYS = {SMALL: "seed-train", LARGE: "train-100k-128"}
EPOCHS = {SMALL: 30, LARGE: 8}
WARM_UP = 20


@dataclass(frozen=True)
class Row:
    """One finetune: the width, where it starts, and how many sequences it has."""

    plan: str
    start: str
    sequences: int

    @property
    def name(self) -> str:
        """All three as words, such as ``V 320 | pca | 100k``."""
        return f"{self.plan} | {self.start} | {self.sequences // 1000}k"


# what others are measured against comes before them
ROWS = (
    *(Row("V 320", start, LARGE) for start in STARTS),
    *(Row(plan, CLOSED_FORM, LARGE) for plan in ("V 256", "V 384")),
    *(Row(plan, start, SMALL) for plan in PLANS for start in STARTS),
)


def main() -> None:
    options = _options()
    settings = replace(healing.BEST, schedule="constant", learning_rate=5e-4, batch_size=128)
    settings = replace(settings, **healing.changed(options.set))
    starts = Starts.of(load(standins.model(MODEL), device=options.device), options.calibration)
    rows = record.earlier_rows(NAME, out=options.out)
    body: dict[str, Any] = {"model": MODEL, "seq_len": 128, "rows": rows}
    for row in ROWS:
        if options.only not in row.name or any(found["name"] == row.name for found in rows):
            continue
        windows = healing_data.tokens(ARRAYS[row.sequences])[: options.sequences]
        epochs = options.budget_epochs or EPOCHS[row.sequences]
        chosen = _with_epochs(settings, epochs, len(windows))
        student = starts.student(PLANS[row.plan], STARTS[row.start])
        healed = finetune(starts, student, windows, chosen)
        made = {"name": row.name, **asdict(row), "settings": asdict(chosen)}
        made |= healing.course(healed) | {"stopped_early": stopped_early(healed, chosen)}
        rows.append(made)
        for found in rows:
            found.update(reached(found, rows))
        path = record.write(NAME, body, out=options.out)
        print(line(rows[-1]), flush=True)
        print(path, flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", default="", help="keep the rows whose names hold this")
    parser.add_argument("--set", default="", help="change the settings: name=value,...")
    parser.add_argument("--budget-epochs", type=int, help="at most so many epochs, for all rows")
    parser.add_argument("--sequences", type=int, help="of each set, only so many")
    parser.add_argument("--calibration", default=token_sets.CALIBRATION)
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def _with_epochs(settings: HealSettings, epochs: int, windows: int) -> HealSettings:
    """Return settings with as many steps of warm-up whatever the epochs are."""
    settings = replace(settings, epochs=epochs)
    share = min(WARM_UP / settings.total_steps(windows), 0.5)
    return replace(settings, warmup_ratio=share)


def finetune(starts: Starts, student: Any, windows: Any, settings: HealSettings) -> Healed:
    """Heal a student in place on short sequences, validated on others of the same length."""
    with tempfile.TemporaryDirectory() as folder:
        return heal(
            student,
            starts.base.model,
            windows,
            healing_data.tokens("validation-128"),
            settings,
            checkpoints=Path(folder) / "run",
        )


def stopped_early(healed: Healed, settings: HealSettings) -> bool:
    """Say whether validation ended the training, not the bound of epochs."""
    return len(healed.history) - healed.best_epoch >= settings.patience


def reached(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, int | None]:
    """Return the epochs to what the closed form has at the start and after its first epoch.

    None where that was not reached, or where the closed form was not trained.
    """
    closed = next((other for other in rows if is_closed_form_of(row, other)), None)
    if closed is None:
        return {"epochs_to_start": None, "epochs_to_first": None}
    return {
        "epochs_to_start": epochs_to(row, closed["initial_val_ppl"]),
        "epochs_to_first": epochs_to(row, closed["epochs"][0]["val_ppl"]),
    }


def is_closed_form_of(row: dict[str, Any], other: dict[str, Any]) -> bool:
    """Say whether another row is the same finetune from the closed form."""
    alike = all(row[key] == other[key] for key in ("plan", "sequences"))
    return alike and other["start"] == CLOSED_FORM


def epochs_to(row: dict[str, Any], wanted: float) -> int | None:
    """Return after how many epochs a validation perplexity is reached first."""
    course = [row["initial_val_ppl"], *(epoch["val_ppl"] for epoch in row["epochs"])]
    return next((epoch for epoch, found in enumerate(course) if found <= wanted), None)


def line(row: dict[str, Any]) -> str:
    """Return a row's figures for the eye."""
    val = " ".join(f"{epoch['val_ppl']:.3f}" for epoch in row["epochs"])
    end = f"best {row['best_epoch']} of {len(row['epochs'])}"
    end += ", stopped" if row["stopped_early"] else ", cut off"
    goal = f"to the closed form {row['epochs_to_start']}, to its first {row['epochs_to_first']}"
    seen = f"{row['tokens_seen'] / 1e6:.2f}M tokens, {row['seconds']:.0f} s"
    return f"{row['name']}: {row['initial_val_ppl']:.3f} -> {val} | {end} | {goal} | {seen}"


if __name__ == "__main__":
    main()
