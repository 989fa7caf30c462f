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
from vdcompress.runs import command

MACHINE = "Machine"


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
    recipe: o.RecipeName = None,
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
        typer.Option(
            rich_help_panel=o.HEALING, help="Which weights learn; body is all but the embeddings."
        ),
    ] = None,
    epochs: o.Epochs = None,
    patience: o.Patience = None,
    learning_rate: o.LearningRate = None,
    batch_size: o.BatchSize = None,
    max_steps: Annotated[
        int | None,
        typer.Option(min=1, rich_help_panel=o.HEALING, help="At most so many, of all epochs."),
    ] = None,
    bf16: Annotated[
        bool | None,
        typer.Option(
            "--bf16/--no-bf16",
            rich_help_panel=o.HEALING,
            help="Compute in bfloat16; left out, on CUDA alone.",
            show_default=False,
        ),
    ] = None,
    micro_batch: Annotated[
        int | None,
        typer.Option(
            min=1,
            rich_help_panel=MACHINE,
            help="Sequences in a forward pass; a step's other ones are accumulated.",
        ),
    ] = None,
    gradient_checkpointing: Annotated[
        bool,
        typer.Option(
            "--gradient-checkpointing",
            rich_help_panel=MACHINE,
            help="Less memory, more time.",
        ),
    ] = False,
    save_steps: Annotated[
        int | None,
        typer.Option(
            min=1,
            rich_help_panel=MACHINE,
            help="Steps between checkpoints, beside the one after each epoch.",
        ),
    ] = None,
    report_to: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            rich_help_panel=MACHINE,
            help="tensorboard, trackio, wandb: logs go into the run's folder; repeatable.",
        ),
    ] = None,
    data: o.DataText = None,
    eval_data: o.EvalData = None,
    text_field: o.TextField = None,
    samples: o.Samples = None,
    validation_samples: Annotated[
        int | None,
        typer.Option(
            min=1, rich_help_panel=o.DATA, help="Held-out sequences that decide when to stop."
        ),
    ] = None,
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

    It spends about 10M tokens, --recipe long ten times as many.
    The result is a new run beside it, with its curves drawn in curves.png.
    Ctrl-C keeps the checkpoints, --resume continues from them.

    Of a recipe it takes heal, evaluation and gate; what is not said there is
    as in the recipe of the run.

    On two GPUs: torchrun --nproc-per-node 2 -m vdcompress.cli finetune --device cuda
    """
    kept = Checkpoints("--save-steps N keeps more than each epoch's end")
    with session(Flags(json, quiet, verbose, debug), kept) as out:
        overrides: dict[str, Any] = {
            "text_field": text_field,
            "heal.distill": distill,
            "heal.train": train and train.value,
            "heal.epochs": epochs,
            "heal.patience": patience,
            "heal.learning_rate": learning_rate,
            "heal.batch_size": batch_size,
            "heal.max_steps": max_steps,
            "heal.micro_batch": micro_batch,
            "heal.gradient_checkpointing": gradient_checkpointing or None,
            "heal.bf16": bf16,
            "heal.save_steps": save_steps,
            "heal.report_to": report_to or None,
            "heal.data": data,
            "heal.samples": samples,
            "heal.validation_samples": validation_samples,
            "heal.seq_len": seq_len,
            "heal.seed": seed,
            "evaluation.data": eval_data,
            "evaluation.windows": windows,
            "evaluation.positions": read_positions(positions),
        }
        from vdcompress import runs
        from vdcompress.healing import processes
        from vdcompress.pipeline.healing import finetune_run
        from vdcompress.pipeline.healing_job import Job, new_job
        from vdcompress.recipe import load_recipe

        where = resolve_device(device)
        if resume:
            require_alone(overrides | {"recipe": recipe, "output": output})

        def job_of_all() -> Job:
            if resume:
                return Job.saved(runs.resolve_partial(run))
            said = None if recipe is None else load_recipe(recipe)
            found = runs.resolve(run)
            return new_job(found, overrides, recipe=said, output=output, force=force)

        processes.begin(where)
        job = processes.shared(job_of_all)
        if run is None:
            out.note(f"run: {job.run}")
        kept.partial = job.partial
        results = finetune_run(job, force=force, device=where, on_event=out.display)
        if processes.is_main():
            show_run(out, results, f"next: {command('export', results['run'])}")
