"""What each command's JSON looks like to people."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from vdcompress import report
from vdcompress.cli.output import Output
from vdcompress.report import Table

Document = dict[str, Any]


def show_plan(out: Output, found: Document) -> None:
    """Show what ``apply --dry-run`` found."""
    out.result(
        found,
        f"{found['model']['id']} ({found['model']['family']}): planned only, nothing was written",
        *_planned(found),
        report.summary(found),
        report.costs(found["cost"]),
        *_prediction(found),
    )
    _hint_at_sharing(out, found)


def show_run(out: Output, results: Document, following: str) -> None:
    """Show a run's results, where it is, and what to do next; then judge its quality gate.

    Raises:
        QualityGateError: the gate was missed.
    """
    from vdcompress.pipeline.document import require_gate

    tables = [report.summary(results), report.positions(results)]
    place = f"written to {results['run']}"
    out.result(results, *filter(None, tables), place)
    if results["command"] == "apply":
        _hint_at_sharing(out, results)
    _warn_if_worse(out, results)
    out.note(f"{_took(results)}; {following}")
    require_gate(results)


def _warn_if_worse(out: Output, results: Document) -> None:
    """Say so where healing helped on its validation text but not on the text that measures."""
    found = results.get("perplexity") or {}
    before, after = found.get("compressed"), found.get("healed")
    if before is not None and after is not None and after > before:
        out.note(
            f"on the text that measures, healing made it worse: {before:.2f} before it, "
            f"{after:.2f} after it; heal on text like that, or at a lower --learning-rate"
        )


def show_evaluation(out: Output, results: Document, *lines: str) -> None:
    """Show what ``evaluate`` found, or ``train``, and further lines."""
    tables = [report.summary(results), report.positions(results), report.tasks(results)]
    out.result(results, *filter(None, tables), *lines)
    out.note(_took(results))


def show_export(out: Output, results: Document) -> None:
    """Show where an export is and that it works."""
    found = results["export"]
    out.result(
        results,
        report.summary(results),
        f"exported to {found['folder']}",
        f"reloaded without vdcompress: logits within {found['logit_difference']:.1e}, it says:",
        f"  {printable(found['text'])}",
    )
    out.note(
        f'load it with: AutoModelForCausalLM.from_pretrained("{found["folder"]}", '
        "trust_remote_code=True)"
    )
    if found["serve"]:
        out.note(f"serve it with: {found['serve'][-1]}")


def printable(text: str) -> str:
    """Return generated text in one line, without characters that steer a terminal."""
    line = " ".join(text.split())
    return "".join(
        letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in line
    )


def show_inspection(out: Output, found: Document) -> None:
    """Show a base's or a compressed model's cache."""
    model = found["model"] or {"id": found["run"], "family": found["plan"]["shape"]["family"]}
    if found["kind"] == "base":
        shape = found["shape"]
        title = (
            f"{model['id']} ({model['family']}): {shape['layers']} layers, hidden "
            f"{shape['hidden']}, {shape['heads']} query heads, {shape['kv_heads']} key/value heads "
            f"of {shape['head_dim']} ({shape['rotary_dim']} rotary), {found['dtype']}"
        )
        tables = [_widths(found), _layouts(found), _arithmetic(found), _capacity(found)]
        if found["energy"] is not None:
            tables = [_energy(found), _latents(found), *_frequencies(found)]
    else:
        title = f"{found['run']}: {model['id']} ({model['family']}), compressed"
        tables = [report.summary(found)] if found["parameters"] else []
        tables += [*_planned(found), report.costs(found["cost"])]
        tables += [_capacity(found), report.engines(found["serving"])]
    plot = [f"drawn in {found['plot']}"] if found.get("plot") else []
    out.result(found, title, *tables, *plot)


def _planned(found: Document) -> list[Table]:
    """Return what every layer keeps, which frequencies, and what that costs."""
    plan, predicted = found["plan"], found.get("predicted_loss")
    tables = [report.layers(plan), report.frequencies(plan), report.spent(plan, predicted)]
    return [table for table in tables if table is not None]


def _prediction(found: Document) -> list[str]:
    """Say what the predicted loss means for perplexity, where there is one."""
    if (predicted := found.get("predicted_loss")) is None:
        return []
    total = predicted["total"]
    return [
        f"predicted: perplexity {math.expm1(total):+.2%} ({total:.4f} nats per token); "
        "to second order, what is measured tends to be up to twice that"
    ]


def _hint_at_sharing(out: Output, found: Document) -> None:
    """Say what the bytes of latents per head would do as one latent of all heads."""
    if not report.is_per_head(found["plan"]):
        return
    shared = found.get("shared_latent")
    if shared is None:
        out.note("with --groups 1 the same bytes hold one latent that all heads share")
        return
    left_out = shared["left_out"]
    out.note(
        f"a latent for each head leaves out {left_out['per_head']:.2%} of what attention writes; "
        f"one for all heads leaves out {left_out['shared']:.2%} in the same bytes (--groups 1)"
    )


def _took(results: Document) -> str:
    return f"took {sum(results['seconds'].values()):.0f} s"


def _widths(found: Document) -> Table:
    rows = tuple(
        (
            str(width["v_dim"]),
            str(width["v_head_dim"]),
            f"{width['bytes_per_token']:,}",
            f"{-100 * width['reduction']:.1f}%" if width["reduction"] else "",
        )
        for width in found["widths"]
    )
    header = ("--v-dim", "per head", "cache, bytes per token", "change")
    return Table("widths that V can have", header, rows, words=0)


def _energy(found: Document) -> Table:
    """Return the energy kept at eighths of the base's width; all widths are in the JSON."""
    full = found["shape"]["kv_heads"] * found["shape"]["head_dim"]
    dims = [full * eighth // 8 for eighth in range(1, 8)]
    rows = []
    for row in found["energy"]:
        if row["latent"] is None:
            cells = _kept(row, [dim / row["groups"] for dim in dims])
            rows.append((str(row["layer"]), row["side"].upper(), str(row["groups"]), *cells))
    header = ("layer", "side", "latents", *map(str, dims))
    return Table("energy kept, %, by numbers per token of all latents", header, tuple(rows))


def _latents(found: Document) -> Table:
    """Return the energy that each latent keeps, of V and K, at eighths of its full width."""
    alone = [row for row in found["energy"] if row["latent"] is not None]
    full = alone[0]["widths"][-1]
    widths = [full * eighth // 8 for eighth in range(1, 8)]
    sides: dict[tuple[int, int], dict[str, list[str]]] = {}
    for row in alone:
        cells = sides.setdefault((row["layer"], row["latent"]), {})
        cells[row["side"]] = _kept(row, widths)
    rows = tuple(
        (str(layer), str(latent), *map(" / ".join, zip(cells["v"], cells["k"], strict=True)))
        for (layer, latent), cells in sides.items()
    )
    each = "head" if alone[0]["groups"] == found["shape"]["kv_heads"] else "group"
    title = f"energy kept of V / K, %, by width of each {each}'s latent"
    return Table(title, ("layer", each, *map(str, widths)), rows)


def _kept(row: Document, widths: Sequence[float]) -> list[str]:
    kept = dict(zip(row["widths"], row["kept"], strict=True))
    return [report.NONE if width not in kept else f"{100 * kept[width]:.1f}" for width in widths]


def _frequencies(found: Document) -> list[Table]:
    """Return the share of K's rotary energy in each frequency; none where RoPE rotates it all."""
    if not any(found["frequencies"]):
        return []
    header = ("layer", *(str(index) for index in range(len(found["frequencies"][0]))))
    rows = tuple(
        (str(layer), *(f"{100 * share:.1f}" for share in shares))
        for layer, shares in enumerate(found["frequencies"])
    )
    return [Table("rotary frequencies, % of K's energy, fastest first", header, rows)]


def _layouts(found: Document) -> Table:
    rows = tuple(
        (
            layout["options"] or "as it is",
            ", ".join(_serving(layout)),
            f"{layout['k_groups']} x {layout['k_head_dim']}",
            f"{layout['v_groups']} x {layout['v_head_dim']}",
            f"{layout['bytes_per_token']:,}",
            f"{-100 * layout['reduction']:.1f}%" if layout["reduction"] else "",
        )
        for layout in found["layouts"]
    )
    header = ("apply with", "served by", "K latents", "V latents", "bytes per token", "change")
    return Table("layouts, and which engines take them", header, rows, words=2)


def _serving(layout: Document) -> list[str]:
    """Return the backends that take a layout without an own class, but for ``generate()``."""
    return [
        engine["backend"]
        for engine in layout["serving"]
        if engine["serves"] and engine["backend"] != "generate()" and not engine["own_code"]
    ]


def _arithmetic(found: Document) -> Table:
    rows = []
    for layout in found["layouts"]:
        for name, maps in (("folded", "folded"), ("per_head", "one per head")):
            cost = layout[name]
            if name == "folded" or (layout["options"] and cost != layout["folded"]):
                figures = ("weights", "flops_per_token", "flops_per_cached_token")
                cells = (f"{cost[figure]:,}" for figure in figures)
                rows.append((layout["options"] or "as it is", maps, *cells))
    header = ("apply with", "maps", "weights", "operations per token", "per cached token")
    return Table("attention, all layers", header, tuple(rows), words=2)


def _capacity(found: Document) -> Table:
    per_rank = found["tokens_per_gib"]
    header = ("ranks", *per_rank)
    row = ("tokens per GiB on each", *(f"{tokens:,}" for tokens in per_rank.values()))
    return Table("under tensor parallelism, 16 bit", header, (row,))
