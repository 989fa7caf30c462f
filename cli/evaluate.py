"""``vdcompress evaluate``: measure a run beside its base."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from vdcompress.cli import options as o
from vdcompress.cli.output import Flags
from vdcompress.cli.session import session
from vdcompress.cli.show import show_evaluation
from vdcompress.cli.values import device as resolve_device
from vdcompress.cli.values import positions as read_positions


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(evaluate)


def evaluate(
    *,
    run: o.Run = None,
    data: o.MeasuredText = None,
    text_field: o.TextField = None,
    windows: o.Windows = None,
    seq_len: o.SeqLen = None,
    positions: o.Positions = None,
    lm_eval: Annotated[
        str | None,
        typer.Option(
            "--lm-eval",
            metavar="TASKS",
            rich_help_panel=o.DATA,
            help="Tasks of lm-evaluation-harness in place of perplexity: names or YAML files, "
            "separated by commas.",
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, rich_help_panel=o.DATA, help="Examples of each of those tasks."),
    ] = None,
    device: o.Device = "cpu",
    json: o.Json = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
    debug: o.Debug = False,
) -> None:
    """Measure a run beside its base model.

    Perplexity, also by position, and the cache that generate() leaves; or tasks of
    lm-evaluation-harness. Nothing is written.
    """
    with session(Flags(json, quiet, verbose, debug)) as out:
        overrides: dict[str, Any] = {
            "text_field": text_field,
            "evaluation.data": data,
            "evaluation.windows": windows,
            "evaluation.seq_len": seq_len,
            "evaluation.positions": read_positions(positions),
        }
        from vdcompress import harness, runs

        tasks = []
        if lm_eval is not None:
            harness.require_installed()
            tasks = harness.task_names(lm_eval)
        folder = runs.resolve(run)
        if run is None:
            out.note(f"run: {folder}")
        from vdcompress.pipeline.evaluation import evaluate_run

        where = resolve_device(device)
        results = evaluate_run(
            folder, overrides, tasks=tasks, limit=limit, device=where, on_event=out.display
        )
        show_evaluation(out, results)
