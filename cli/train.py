"""``vdcompress train``: a model from scratch, to compare with."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from vdcompress.cli import options as o
from vdcompress.cli.output import Flags
from vdcompress.cli.resuming import Checkpoints, require_alone
from vdcompress.cli.session import session
from vdcompress.cli.show import show_evaluation
from vdcompress.cli.values import device as resolve_device
from vdcompress.cli.values import positions as read_positions
from vdcompress.errors import UsageError


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(train)


def train(
    *,
    recipe: Annotated[
        str | None,
        typer.Argument(
            metavar="[RECIPE]",
            help="A recipe with a scratch section, such as seed-vdproj; with --resume, its run.",
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Continue the training that was interrupted last."),
    ] = False,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            rich_help_panel=o.DATA,
            help="A folder, an alias or a hub id that has the tokenizer.",
        ),
    ] = None,
    data: o.DataText = None,
    eval_data: o.EvalData = None,
    text_field: o.TextField = None,
    epochs: o.Epochs = None,
    patience: o.Patience = None,
    learning_rate: o.LearningRate = None,
    batch_size: o.BatchSize = None,
    samples: o.Samples = None,
    seq_len: o.SeqLen = None,
    windows: o.Windows = None,
    positions: o.Positions = None,
    seed: o.Seed = None,
    device: o.Device = "cpu",
    output: o.Folder = None,
    force: o.Force = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
    debug: o.Debug = False,
) -> None:
    """Train a model from random weights, as the seed-* recipes describe it, to compare others with.

    Ctrl-C keeps the checkpoints, --resume continues from them.
    """
    kept = Checkpoints()
    with session(Flags(json, quiet, verbose, debug), kept) as out:
        overrides: dict[str, Any] = {
            "scratch.tokenizer": tokenizer,
            "text_field": text_field,
            "calibration.data": data,
            "evaluation.data": eval_data,
            "heal.epochs": epochs,
            "heal.patience": patience,
            "heal.learning_rate": learning_rate,
            "heal.batch_size": batch_size,
            "heal.samples": samples,
            "heal.seq_len": seq_len,
            "evaluation.seq_len": seq_len,
            "evaluation.windows": windows,
            "evaluation.positions": read_positions(positions),
            "heal.seed": seed,
            "scratch.seed": seed,
        }
        if resume:
            require_alone(overrides | {"output": output})
        elif recipe is None:
            raise UsageError("which recipe?", "try: vdcompress train seed-vdproj --data FILE")
        from vdcompress import runs
        from vdcompress.healing import processes
        from vdcompress.pipeline import scratch
        from vdcompress.recipe import load_scratch_recipe

        where = resolve_device(device)

        def job_of_all() -> scratch.Training:
            if resume:
                return scratch.Training.saved(runs.resolve_partial(recipe, scratch=True))
            merged = load_scratch_recipe(str(recipe)).merged(overrides)
            return scratch.Training.new(merged, output=output, force=force)

        processes.begin(where)
        job = processes.shared(job_of_all)
        kept.partial = job.partial
        results = scratch.train_scratch(job, force=force, device=where, on_event=out.display)
        if processes.is_main():
            show_evaluation(out, results, f"written to {results['run']}")
