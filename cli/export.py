"""``vdcompress export``: a folder that transformers loads without vdcompress."""

from __future__ import annotations

from typing import Annotated

import typer

from vdcompress.cli import options as o
from vdcompress.cli.output import Flags
from vdcompress.cli.session import session
from vdcompress.cli.show import show_export


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(export)


def export(
    *,
    run: o.Run = None,
    output: o.Folder = None,
    target: Annotated[
        o.Target,
        typer.Option(
            "--for",
            rich_help_panel=o.OUTPUT,
            help="vllm folds the heads' maps into projections, so that stock vLLM cuts them over "
            "several GPUs, and refuses what vLLM cannot take.",
        ),
    ] = o.Target.transformers,
    force: o.Force = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
    debug: o.Debug = False,
) -> None:
    """Write a run as a folder that transformers loads.

    It is reloaded in a fresh process without vdcompress before it counts. Without -o it is
    exports/RUN.
    """
    with session(Flags(json, quiet, verbose, debug)) as out:
        from vdcompress import runs

        folder = runs.resolve(run)
        if run is None:
            out.note(f"run: {folder}")
        from vdcompress.pipeline.delivery import export_run

        results = export_run(
            folder, output=output, target=target.value, force=force, on_event=out.display
        )
        show_export(out, results)
