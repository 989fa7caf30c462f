"""``vdcompress inspect``: what a model's cache is, or could be."""

from __future__ import annotations

from typing import Annotated

import typer

from vdcompress.cli import options as o
from vdcompress.cli.output import Flags
from vdcompress.cli.session import session
from vdcompress.cli.show import show_inspection


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
    json: o.Json = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
    debug: o.Debug = False,
) -> None:
    """Show what a model's cache is or could be, and who serves it."""
    with session(Flags(json, quiet, verbose, debug)) as out:
        from vdcompress import runs
        from vdcompress.pipeline.inspection import inspect_model

        target = model or str(runs.latest())
        if model is None:
            out.note(f"run: {target}")
        show_inspection(out, inspect_model(target, revision))
