"""``vdcompress apply``: compress a model, measure it beside its base, write the artefact."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from vdcompress.cli import options as o
from vdcompress.cli.output import Flags
from vdcompress.cli.session import session
from vdcompress.cli.show import show_plan, show_run
from vdcompress.cli.values import bits as read_bits
from vdcompress.cli.values import device as resolve_device
from vdcompress.cli.values import positions as read_positions
from vdcompress.cli.values import recipe_from
from vdcompress.cli.values import size as read_size
from vdcompress.runs import command


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(apply)


def apply(
    *,
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="A folder, an alias (pythia-70m) or a hub id."),
    ] = None,
    v_dim: Annotated[
        int | None,
        typer.Option(help="Width of V per token and layer, all latents.", rich_help_panel=o.KEPT),
    ] = None,
    k_dim: Annotated[
        int | None,
        typer.Option(help="Width of K, rotary and other dimensions.", rich_help_panel=o.KEPT),
    ] = None,
    groups: Annotated[
        int | None,
        typer.Option(
            help="Latents per layer, each shared by equally many heads; one per head.",
            rich_help_panel=o.KEPT,
        ),
    ] = None,
    v_groups: Annotated[
        int | None, typer.Option(help="The same for V alone.", rich_help_panel=o.KEPT)
    ] = None,
    k_groups: Annotated[
        int | None, typer.Option(help="The same for K alone.", rich_help_panel=o.KEPT)
    ] = None,
    k_rotary_dim: Annotated[
        int | None,
        typer.Option(help="How much of --k-dim is rotary.", rich_help_panel=o.KEPT),
    ] = None,
    kv_budget: Annotated[
        float | None,
        typer.Option(
            metavar="FRACTION",
            help="Of the base's bytes per token; calibration decides groups and widths.",
            rich_help_panel=o.KEPT,
        ),
    ] = None,
    allocation: Annotated[
        o.Allocation | None,
        typer.Option(
            help="Widths of all layers alike, or by layer at the same bytes.",
            rich_help_panel=o.KEPT,
        ),
    ] = None,
    bits: Annotated[
        str | None,
        typer.Option(
            metavar="BITS",
            help="Of all latents: 16, 8, 4, 3, 2; auto lets --kv-budget choose.",
            rich_help_panel=o.KEPT,
        ),
    ] = None,
    v_bits: Annotated[
        int | None,
        typer.Option(help="Bits of V's numbers: 16, 8, 4, 3 or 2.", rich_help_panel=o.KEPT),
    ] = None,
    k_bits: Annotated[
        int | None, typer.Option(help="Bits of K's numbers.", rich_help_panel=o.KEPT)
    ] = None,
    k_rotary_bits: Annotated[
        int | None,
        typer.Option(help="Of its rotary ones; --k-bits, but at least 8.", rich_help_panel=o.KEPT),
    ] = None,
    sinks: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="First tokens that stay in 16 bits; 4 below 8 bits.",
            rich_help_panel=o.KEPT,
        ),
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Newest tokens that stay in 16 bits; 64 below 8 bits, 16 with --bits auto.",
            rich_help_panel=o.KEPT,
        ),
    ] = None,
    target: Annotated[
        o.Target | None,
        typer.Option("--for", help="What must be able to run it.", rich_help_panel=o.KEPT),
    ] = None,
    initializer: Annotated[
        str | None,
        typer.Option(
            help="fisher, optimal, pca, svd or random.",
            rich_help_panel=o.WHAT,
        ),
    ] = None,
    refit: Annotated[
        o.Refit | None,
        typer.Option(help="Refit the output projection on all heads.", rich_help_panel=o.WHAT),
    ] = None,
    alternate: Annotated[
        int | None,
        typer.Option(min=0, help="Rounds of alternation after it.", rich_help_panel=o.WHAT),
    ] = None,
    revision: Annotated[
        str | None,
        typer.Option(help="Branch, tag or commit of a hub id.", rich_help_panel=o.WHAT),
    ] = None,
    dtype: Annotated[
        o.Dtype | None,
        typer.Option(help="Of the weights written; the model's own.", rich_help_panel=o.WHAT),
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
    max_memory: o.MaxMemory = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", rich_help_panel=o.OUTPUT, help="Only plan, write nothing."),
    ] = False,
    output: o.Folder = None,
    force: o.Force = False,
    json: o.Json = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
    debug: o.Debug = False,
) -> None:
    """Compress a model's key/value cache and measure what it costs.

    The original experiment is: vdcompress apply pythia-70m --v-dim 320

    Half of the cache, wherever it costs least: vdcompress apply pythia-70m --kv-budget 0.5

    All of it in few bits: vdcompress apply pythia-70m --k-bits 8 --v-bits 4

    Widths and bits from one budget: vdcompress apply pythia-70m --kv-budget 0.25 --bits auto
    """
    with session(Flags(json, quiet, verbose, debug)) as out:
        overrides: dict[str, Any] = {
            "model": model,
            "revision": revision,
            "dtype": dtype and dtype.value,
            "text_field": text_field,
            "plan.v_dim": v_dim,
            "plan.k_dim": k_dim,
            "plan.groups": groups,
            "plan.v_groups": v_groups,
            "plan.k_groups": k_groups,
            "plan.k_rotary_dim": k_rotary_dim,
            "plan.kv_budget": kv_budget,
            "plan.allocation": allocation and allocation.value,
            "plan.bits": read_bits(bits),
            "plan.v_bits": v_bits,
            "plan.k_bits": k_bits,
            "plan.k_rotary_bits": k_rotary_bits,
            "plan.sinks": sinks,
            "plan.window": window,
            "plan.target": target and target.value,
            "start.initializer": initializer,
            "start.refit": refit and refit.value,
            "start.alternate": alternate,
            "start.seed": seed,
            "calibration.data": data,
            "calibration.samples": samples,
            "calibration.seq_len": seq_len,
            "calibration.seed": seed,
            "evaluation.data": eval_data,
            "evaluation.windows": windows,
            "evaluation.positions": read_positions(positions),
            "heal.seed": seed,
        }
        merged = recipe_from(recipe, overrides)
        from vdcompress.recipe import model_of

        model_of(merged)
        from vdcompress.pipeline.apply import apply_recipe, preview

        where, most = resolve_device(device), read_size(max_memory)
        if dry_run:
            show_plan(out, preview(merged, device=where, on_event=out.display))
            return
        results = apply_recipe(
            merged,
            output=output,
            force=force,
            device=where,
            max_memory=most,
            on_event=out.display,
        )
        show_run(out, results, f"next: {command('finetune', results['run'])}")
