"""``vdcompress evaluate``: measure a run beside its base."""

from __future__ import annotations

from typing import Any

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
    device: o.Device = "cpu",
    json: o.Json = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
    debug: o.Debug = False,
) -> None:
    """Measure a run beside its base model.

    Perplexity, also by position, and the cache that generate() leaves. Nothing is written.
    """
    with session(Flags(json, quiet, verbose, debug)) as out:
        overrides: dict[str, Any] = {
            "text_field": text_field,
            "evaluation.data": data,
            "evaluation.windows": windows,
            "evaluation.seq_len": seq_len,
            "evaluation.positions": read_positions(positions),
        }
        from vdcompress import runs

        folder = runs.resolve(run)
        if run is None:
            out.note(f"run: {folder}")
        from vdcompress.pipeline.evaluation import evaluate_run

        where = resolve_device(device)
        results = evaluate_run(folder, overrides, device=where, on_event=out.display)
        show_evaluation(out, results)
