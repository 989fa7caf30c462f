"""``vdcompress bench``: the speed of a run beside its base."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vdcompress.cli import options as o
from vdcompress.cli.drawing import require_writable
from vdcompress.cli.lists import values, whole
from vdcompress.cli.output import Flags
from vdcompress.cli.session import session
from vdcompress.cli.values import device as resolve_device
from vdcompress.errors import UsageError

if TYPE_CHECKING:
    from vdcompress.cli.output import Output
    from vdcompress.pipeline.benching import Bench

KILO = 1024


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(bench)


def bench(
    *,
    run: o.Run = None,
    context: Annotated[
        str,
        typer.Option(
            metavar="LIST",
            rich_help_panel=o.WHAT,
            help="Tokens in the cache when decoding starts; 4k are 4096.",
        ),
    ] = "1k,4k,16k",
    batch: Annotated[
        str,
        typer.Option(metavar="LIST", rich_help_panel=o.WHAT, help="Sequences at once: 1,8,32."),
    ] = "1",
    prefill: Annotated[
        str | None,
        typer.Option(
            metavar="TOKENS",
            rich_help_panel=o.WHAT,
            help="Of the prompt; left out, the context, at most 1024.",
        ),
    ] = None,
    new_tokens: Annotated[
        int, typer.Option(min=1, rich_help_panel=o.WHAT, help="Tokens decoded in each round.")
    ] = 16,
    repeats: Annotated[
        int, typer.Option(min=1, rich_help_panel=o.WHAT, help="Rounds; medians are shown.")
    ] = 3,
    dtype: Annotated[
        o.Dtype | None,
        typer.Option(
            rich_help_panel=o.WHAT,
            help="Of weights and caches; left out, what the run is stored in.",
        ),
    ] = None,
    device: o.Device = "cpu",
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="PNG",
            rich_help_panel=o.OUTPUT,
            help="Draw the figures into this file.",
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
    """Measure a run's speed, memory and cache beside its base with transformers' own caches.

    Decoding is measured behind a cache that was filled with random numbers; no context is read.
    All take turns in every round. Ctrl-C shows what was measured so far.
    """
    shown = Shown()
    with session(Flags(json, quiet, verbose, debug), shown) as out:
        contexts = values("--context", context, tokens) or ()
        batches = values("--batch", batch, whole) or ()
        prompts = values("--prefill", prefill, tokens) or (None,)
        if len(prompts) > 1:
            raise UsageError(f"--prefill {prefill!r} is not one number", "like: --prefill 1k")
        require_writable(output, force=force)
        from vdcompress import runs

        folder = runs.resolve(run)
        if run is None:
            out.note(f"run: {folder}")
        from vdcompress.pipeline.benching import Workload, open_bench, run_bench

        work = Workload(contexts, batches, prompts[0], new_tokens, repeats, dtype and dtype.value)
        opened = open_bench(folder, work, device=resolve_device(device), on_event=out.display)
        try:
            run_bench(opened)
        except KeyboardInterrupt:
            shown.rows = len(opened.rows)
            if opened.rows:
                show(out, opened, None)
            raise
        show(out, opened, output)


class Shown:
    """What an interrupted benchmark showed."""

    def __init__(self) -> None:
        self.rows = 0

    def __call__(self) -> tuple[str, str]:
        """Say it."""
        if not self.rows:
            return "nothing was measured", ""
        return f"the {self.rows} rows measured so far are shown", ""


def show(out: Output, opened: Bench, output: Path | None) -> None:
    """Draw what was measured, if it is to be drawn, and print it.

    Raises:
        ModelError: nothing was measured.
    """
    from vdcompress.bench_report import bench_legend, bench_tables
    from vdcompress.pipeline.benching import is_measured, require_measured

    found: dict[str, Any] = opened.document()
    output = output if is_measured(found) else None
    place = []
    if output is not None:
        from vdcompress.atomic import write
        from vdcompress.plots_bench import benchmark

        write(output, benchmark(found))
        place.append(f"drawn in {output}")
    plot = None if output is None else str(output)
    out.result(found | {"plot": plot}, *bench_tables(found), bench_legend(found), *place)
    require_measured(found)


def tokens(text: str) -> int:
    """Read ``4k`` or ``4096``, a whole number above zero."""
    thousands = text.lower().endswith("k")
    return whole(text[:-1] if thousands else text) * (KILO if thousands else 1)
