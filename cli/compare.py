"""``vdcompress compare``: runs side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vdcompress.cli import options as o
from vdcompress.cli.drawing import require_writable
from vdcompress.cli.output import Flags
from vdcompress.cli.session import session


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(compare)


def compare(
    *,
    folders: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="RUN",
            help="Run folders or exported ones; left out, all finished runs under ./runs.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="PNG",
            rich_help_panel=o.OUTPUT,
            help="Draw them into this file.",
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
    """Show runs side by side: size, perplexity, by position too, and how they were healed.

    Nothing is measured: the figures are those that the runs have. It warns of
    runs that were measured on different text.
    """
    with session(Flags(json, quiet, verbose, debug)) as out:
        require_writable(output, force=force)
        from vdcompress import runs
        from vdcompress.comparison_report import comparison_tables
        from vdcompress.pipeline.comparison import compare_runs

        named = [runs.resolve(folder) for folder in folders or ()]
        chosen = named or runs.finished() or [runs.latest()]
        found = compare_runs(chosen, on_event=out.display)
        if output is not None:
            from vdcompress.atomic import write
            from vdcompress.plots_comparison import comparison

            write(output, comparison(found))
        place = [f"drawn in {output}"] if output is not None else []
        plot = None if output is None else str(output)
        out.result(found | {"plot": plot}, *comparison_tables(found), *place)
