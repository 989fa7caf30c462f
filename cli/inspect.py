"""``vdcompress inspect``: what a model's cache is, or could be."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vdcompress.cli import options as o
from vdcompress.cli.drawing import require_writable
from vdcompress.cli.output import Flags
from vdcompress.cli.session import session
from vdcompress.cli.show import show_inspection
from vdcompress.cli.values import device as resolve_device
from vdcompress.cli.values import recipe_from
from vdcompress.errors import UsageError


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(inspect)


def inspect(
    *,
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL|RUN]",
            help="A base model or a run; left out, the latest run under ./runs.",
        ),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            metavar="TEXT",
            rich_help_panel=o.DATA,
            help="Calibrate a base model on a file, a folder, a hub dataset or stdlib, and show "
            "the energy that latents of each width keep.",
        ),
    ] = None,
    groups: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=o.DATA,
            help="Latents per layer that are shown one by one; one per head.",
        ),
    ] = None,
    text_field: o.TextField = None,
    samples: o.Samples = None,
    seq_len: o.SeqLen = None,
    seed: o.Seed = None,
    device: o.Device = "cpu",
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="PNG",
            rich_help_panel=o.OUTPUT,
            help="Draw the energy into this file.",
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", rich_help_panel=o.OUTPUT, help="Replace that file.")
    ] = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
    debug: o.Debug = False,
) -> None:
    """Show what a model's cache is or could be, and who serves it.

    With text, also how much each width of a latent keeps: vdcompress inspect demo --data stdlib
    """
    with session(Flags(json, quiet, verbose, debug)) as out:
        from vdcompress import runs

        if data is None:
            _require_no_energy(output, groups)
            from vdcompress.pipeline.inspection import inspect_model

            target = model or str(runs.latest())
            if model is None:
                out.note(f"run: {target}")
            show_inspection(out, inspect_model(target, revision))
            return
        require_writable(output, force=force)
        overrides = {
            "model": model,
            "revision": revision,
            "text_field": text_field,
            "calibration.data": data,
            "calibration.samples": samples,
            "calibration.seq_len": seq_len,
            "calibration.seed": seed,
            "start.seed": seed,
        }
        recipe = recipe_from(None, overrides)
        from vdcompress.pipeline.inspection import inspect_energy

        where = resolve_device(device)
        found = inspect_energy(recipe, groups=groups, device=where, on_event=out.display)
        if output is not None:
            from vdcompress.atomic import write
            from vdcompress.plots_energy import energy

            write(output, energy(found["energy"], f"{found['model']['id']}: energy left out"))
        show_inspection(out, found | {"plot": None if output is None else str(output)})


def _require_no_energy(output: Path | None, groups: int | None) -> None:
    if groups is not None:
        raise UsageError("--groups without text: there are no latents to show", "add: --data TEXT")
    if output is not None:
        raise UsageError("there is no energy to draw without text", "add: --data TEXT")
