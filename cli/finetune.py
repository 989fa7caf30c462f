"""``vdcompress finetune``: heal a run."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from vdcompress.cli import options as o
from vdcompress.cli.output import Flags
from vdcompress.cli.resuming import Checkpoints, require_alone
from vdcompress.cli.session import session
from vdcompress.cli.show import show_run
from vdcompress.cli.values import device as resolve_device
from vdcompress.cli.values import positions as read_positions


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(finetune)


def finetune(
    *,
    run: o.Run = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Continue the finetune that was interrupted last."),
    ] = False,
    distill: Annotated[
        bool | None,
        typer.Option(
            "--distill/--no-distill",
            rich_help_panel=o.HEALING,
            help="Learn from the base model, or from the text alone.",
            show_default=False,
        ),
    ] = None,
    train: Annotated[
        o.Train | None,
        typer.Option(rich_help_panel=o.HEALING, help="Which weights learn."),
    ] = None,
    epochs: o.Epochs = None,
    patience: o.Patience = None,
    learning_rate: o.LearningRate = None,
    batch_size: o.BatchSize = None,
    data: o.DataText = None,
    eval_data: o.EvalData = None,
    text_field: o.TextField = None,
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
    """Heal a run with a short finetune.

    The result is a new run beside it. Ctrl-C keeps the checkpoints, --resume continues from them.
    """
    kept = Checkpoints()
    with session(Flags(json, quiet, verbose, debug), kept) as out:
        overrides: dict[str, Any] = {
            "text_field": text_field,
            "heal.distill": distill,
            "heal.train": train and train.value,
            "heal.epochs": epochs,
            "heal.patience": patience,
            "heal.learning_rate": learning_rate,
            "heal.batch_size": batch_size,
            "heal.data": data,
            "heal.samples": samples,
            "heal.seq_len": seq_len,
            "heal.seed": seed,
            "evaluation.data": eval_data,
            "evaluation.windows": windows,
            "evaluation.positions": read_positions(positions),
        }
        from vdcompress import runs
        from vdcompress.healing import processes
        from vdcompress.pipeline import healing

        where = resolve_device(device)
        if resume:
            require_alone(overrides, output)

        def job_of_all() -> healing.Job:
            if resume:
                return healing.Job.saved(runs.resolve_partial(run))
            return healing.new_job(runs.resolve(run), overrides, output=output, force=force)

        processes.begin(where)
        job = processes.shared(job_of_all)
        if run is None:
            out.note(f"run: {job.run}")
        kept.partial = job.partial
        results = healing.finetune_run(job, force=force, device=where, on_event=out.display)
        if processes.is_main():
            show_run(out, results, f"next: vdcompress export {results['run']}")
