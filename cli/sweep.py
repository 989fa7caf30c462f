"""``vdcompress sweep``: one calibration, many plans."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from vdcompress.cli import options as o
from vdcompress.cli.lists import one_of, share, values, whole, whole_or_zero
from vdcompress.cli.output import Flags, Output
from vdcompress.cli.session import session
from vdcompress.cli.values import bits as read_bits
from vdcompress.cli.values import device as resolve_device
from vdcompress.cli.values import positions as read_positions
from vdcompress.cli.values import recipe_from
from vdcompress.report import Table
from vdcompress.request import ALLOCATIONS, TARGETS

LISTS = "What, as lists: 320,256"


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(sweep)


def listed(help_text: str) -> Any:
    """Return an option that takes a list."""
    return typer.Option(metavar="LIST", rich_help_panel=LISTS, help=help_text)


def sweep(
    *,
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="A folder, an alias (pythia-70m) or a hub id."),
    ] = None,
    v_dim: Annotated[str | None, listed("Widths of V per token and layer.")] = None,
    k_dim: Annotated[str | None, listed("Widths of K.")] = None,
    k_rotary_dim: Annotated[str | None, listed("How much of K is rotary.")] = None,
    groups: Annotated[str | None, listed("Latents per layer, of both sides.")] = None,
    v_groups: Annotated[str | None, listed("Latents of V.")] = None,
    k_groups: Annotated[str | None, listed("Latents of K.")] = None,
    kv_budget: Annotated[
        str | None, listed("Fractions of the base's bytes, beside the widths.")
    ] = None,
    allocation: Annotated[str | None, listed("uniform, layers.")] = None,
    bits: Annotated[str | None, listed("Of all latents: 16, 8, 4, 3, 2, auto.")] = None,
    v_bits: Annotated[str | None, listed("Bits of V.")] = None,
    k_bits: Annotated[str | None, listed("Bits of K.")] = None,
    k_rotary_bits: Annotated[str | None, listed("Bits of K's rotary part.")] = None,
    target: Annotated[
        str | None,
        typer.Option(
            "--for",
            metavar="LIST",
            rich_help_panel=LISTS,
            help="transformers, vllm: what it is for.",
        ),
    ] = None,
    initializer: Annotated[str | None, listed("fisher, optimal, pca, svd, random.")] = None,
    refit: Annotated[str | None, listed(f"{', '.join(o.Refit)}.")] = None,
    revision: Annotated[
        str | None,
        typer.Option(help="Branch, tag or commit of a hub id.", rich_help_panel=o.WHAT),
    ] = None,
    dtype: Annotated[
        o.Dtype | None,
        typer.Option(help="Of the weights; the model's own.", rich_help_panel=o.WHAT),
    ] = None,
    recipe: o.RecipeName = None,
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
    json: o.Json = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
    debug: o.Debug = False,
) -> None:
    """Calibrate once and measure many plans.

    Every combination of the lists is a row, beside the base and its cache in
    int8 and int4. Rows are kept as they finish: the same command continues,
    other lists add rows. At the end a table and a plot. Without -o it is
    sweeps/MODEL-..., a name that belongs to the settings.
    """
    kept = Rows()
    with session(Flags(json, quiet, verbose, debug), kept) as out:
        overrides: dict[str, Any] = {
            "model": model,
            "revision": revision,
            "dtype": dtype and dtype.value,
            "text_field": text_field,
            "start.seed": seed,
            "calibration.data": data,
            "calibration.samples": samples,
            "calibration.seq_len": seq_len,
            "calibration.seed": seed,
            "evaluation.data": eval_data,
            "evaluation.windows": windows,
            "evaluation.positions": read_positions(positions),
        }
        axes = {
            "v_dim": values("--v-dim", v_dim, whole),
            "k_dim": values("--k-dim", k_dim, whole),
            "k_rotary_dim": values("--k-rotary-dim", k_rotary_dim, whole_or_zero),
            "groups": values("--groups", groups, whole),
            "v_groups": values("--v-groups", v_groups, whole),
            "k_groups": values("--k-groups", k_groups, whole),
            "kv_budget": values("--kv-budget", kv_budget, share),
            "allocation": values("--allocation", allocation, one_of(ALLOCATIONS)),
            "bits": values("--bits", bits, read_bits),
            "v_bits": values("--v-bits", v_bits, whole),
            "k_bits": values("--k-bits", k_bits, whole),
            "k_rotary_bits": values("--k-rotary-bits", k_rotary_bits, whole),
            "target": values("--for", target, one_of(TARGETS)),
            "initializer": values("--initializer", initializer, str),
            "refit": values("--refit", refit, one_of([choice.value for choice in o.Refit])),
        }
        merged = recipe_from(recipe, overrides)
        from vdcompress.recipe import model_of

        model_of(merged)
        from vdcompress.pipeline.sweep import new_sweep, run_sweep

        where = resolve_device(device)
        given = {name: found for name, found in axes.items() if found is not None}
        job = new_sweep(merged, given, output=output, on_event=out.display)
        kept.folder = job.folder.path
        kept.finished = job.folder.finished
        out.note(f"sweep: {job.folder.path}")
        show(out, run_sweep(job, device=where, on_event=out.display))


def show(out: Output, found: dict[str, Any]) -> None:
    """Show a sweep's tables and where its files are.

    Raises:
        ModelError: no plan could be measured.
    """
    from vdcompress.pipeline.sweep import require_rows
    from vdcompress.sweep_report import LEGEND, budget_table, sweep_table, unmeasured_table

    rest = unmeasured_table(found)
    place = f"written to {found['run']}: sweep.json and rows/"
    place += f", plotted in {found['plot']}" if found["plot"] else ""
    tables: list[Table | str] = [sweep_table(found), f"{LEGEND}\n", budget_table(found)]
    out.result(found, *tables, *([rest] if rest else []), place)
    require_rows(found)


class Rows:
    """What an interrupted sweep leaves behind."""

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.finished: Callable[[], int] = int

    def __call__(self) -> tuple[str, str]:
        """Say it."""
        if self.folder is None or not (count := self.finished()):
            return "nothing was written", ""
        rows = f"{count} finished row{'s' if count > 1 else ''}"
        return f"{rows} kept in {self.folder}", "the same command again continues"
