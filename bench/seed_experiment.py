"""The original experiment: its recipes from scratch, on one GPU.

    VDCOMPRESS_HEAL_TOKENS=... python bench/seed_experiment.py --device cuda

Every row is a shipped recipe at one seed, which sets weights and the order of sequences: 10,000
sequences of 128 tokens of the training text, validated on others of the same text. Architectures
of one seed begin with the same weights wherever they have the same modules. Perplexity by position
is that of the best weights on the validation sequences, so its mean is the validation perplexity.

A step of 8 x 128 tokens leaves a GPU waiting for its launches, so rows run beside each other, each
in a process. A row is saved as soon as it is there, and what the file has is not made again; a row
that was interrupted goes on from its last epoch, kept under --checkpoints.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import healing_data
import record
import torch
from healing_starts import stopped_early

import healing
from vdcompress.evaluate import evaluate_windows
from vdcompress.events import EpochEnded, Event
from vdcompress.load import moved
from vdcompress.pipeline.scratch_settings import Scratch
from vdcompress.recipe import Recipe, load_recipe
from vdcompress.scratch.phases import train_phases

NAME = "seed-experiment"
RECIPES = ("seed-restore-2phase", "seed-vdproj", "seed-restore-e2e", "seed-baseline")
TRAINING, VALIDATION = "seed-train", "validation-128"
PRECISIONS = ("float32", "tf32", "bfloat16")


@dataclass(frozen=True)
class Row:
    """One recipe at one seed.

    Attributes:
        recipe: its name.
        seed: of weights and of the order of sequences.
        precision: of matrix products; ``float32`` is the recipes' own.
        device: where to train.
        checkpoints: folder for those of all rows.
        threads: of the CPU.
        changes: settings in place of the recipe's.
    """

    recipe: str
    seed: int
    precision: str
    device: str
    checkpoints: Path
    threads: int
    changes: dict[str, Any]

    @property
    def name(self) -> str:
        """Recipe and seed, such as ``seed-vdproj, seed 0``."""
        return f"{self.recipe}, seed {self.seed}"

    @property
    def folder(self) -> Path:
        """Where its own checkpoints are."""
        return self.checkpoints / f"{self.recipe}-{self.seed}"

    def merged(self) -> Recipe:
        """Return the recipe with this row's seed."""
        changes = {"scratch.seed": self.seed, "heal.seed": self.seed} | self.changes
        if self.precision == "bfloat16":
            changes["heal.bf16"] = True
        return load_recipe(self.recipe).merged(changes)


def main() -> None:
    options = _options()
    rows = record.earlier_rows(NAME, out=options.out)
    done = {(row["recipe"], row["seed"]) for row in rows}
    body: dict[str, Any] = {"seq_len": 128, "processes": options.processes, "rows": rows}
    waiting = [row for row in _rows(options) if (row.recipe, row.seed) not in done]
    failed = []
    with ProcessPoolExecutor(
        options.processes,
        mp_context=multiprocessing.get_context("spawn"),
        max_tasks_per_child=1,  # a process gives the GPU's memory back when it ends
    ) as pool:
        running = {pool.submit(made, row): row for row in waiting}
        for future in as_completed(running):
            row = running[future]
            if (error := future.exception()) is not None:
                failed.append(f"{row.name}: {error}")
                print(failed[-1], file=sys.stderr, flush=True)
                continue
            rows.append(future.result())
            path = record.write(NAME, body, out=options.out)
            shutil.rmtree(row.folder, ignore_errors=True)
            print(f"{line(rows[-1])}\n{path}", flush=True)
    if failed:
        sys.exit(f"{len(failed)} rows failed; run it again for these")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--recipes", default=",".join(RECIPES))
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--processes", type=int, default=4, help="rows beside each other")
    parser.add_argument("--precision", choices=PRECISIONS, default="float32")
    parser.add_argument("--epochs", type=int, help="at most so many")
    parser.add_argument("--sequences", type=int, help="to train on, only so many")
    parser.add_argument("--validation", type=int, help="sequences to validate on")
    parser.add_argument(
        "--checkpoints", type=Path, default=Path(tempfile.gettempdir()) / f"vdcompress-{NAME}"
    )
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


def _rows(options: argparse.Namespace) -> list[Row]:
    """Return the rows, seed by seed, so that what is interrupted has whole seeds."""
    changes = {
        "heal.epochs": options.epochs,
        "heal.samples": options.sequences,
        "heal.validation_samples": options.validation,
    }
    threads = max(1, (os.cpu_count() or 1) // options.processes)
    return [
        Row(
            recipe,
            seed,
            options.precision,
            options.device,
            options.checkpoints,
            threads,
            {name: value for name, value in changes.items() if value is not None},
        )
        for seed in map(int, options.seeds.split(","))
        for recipe in options.recipes.split(",")
    ]


def made(row: Row) -> dict[str, Any]:
    """Train one row in this process, or go on with it, and return what the table needs."""
    torch.set_num_threads(row.threads)
    if row.precision == "tf32":
        torch.set_float32_matmul_precision("high")
    recipe = row.merged()
    scratch = Scratch.of(recipe)
    training = healing_data.tokens(TRAINING)[: recipe.heal.samples]
    validation = healing_data.tokens(VALIDATION)[: recipe.heal.validation_samples]
    model = moved(scratch.model(), row.device)

    def tell(event: Event) -> None:
        if isinstance(event, EpochEnded):
            figures = f"train {event.train_ppl:.1f} val {event.val_ppl:.1f}"
            print(f"{row.name}: epoch {event.epoch}, {figures}", flush=True)

    phases = train_phases(
        model,
        training,
        validation,
        scratch.phases,
        checkpoints=row.folder,
        resume=True,
        on_event=tell,
    )
    with torch.autocast(model.device.type, torch.bfloat16, row.precision == "bfloat16"):
        found = evaluate_windows(model, validation, batch=64).to_json()
    return {
        "recipe": row.recipe,
        "seed": row.seed,
        "precision": row.precision,
        "sequences": len(training),
        "validation_sequences": len(validation),
        "parameters": scratch.counts(),
        "bytes_per_token": scratch.plan.bytes_per_token,
        "reduction": scratch.plan.reduction,
        "settings": asdict(scratch.phases[-1]),
        **healing.course(phases[-1]),
        "stopped_early": stopped_early(phases[-1], scratch.phases[-1]),
        "first_phase": healing.course(phases[0]) if len(phases) > 1 else None,
        "perplexity": found["perplexity"]["compressed"],
        "positions": [
            {"from": one["from"], "to": one["to"], "perplexity": one["compressed"]}
            for one in found["positions"]
        ],
    }


def line(row: dict[str, Any]) -> str:
    """Return a row's figures for the eye."""
    positions = " ".join(f"{one['perplexity']:.1f}" for one in row["positions"])
    end = f"best epoch {row['best_epoch']} of {len(row['epochs'])}"
    name = f"{row['recipe']}, seed {row['seed']}"
    return f"{name}: {row['perplexity']:.2f}, {end} | {positions} | {row['seconds']:.0f} s"


if __name__ == "__main__":
    main()
