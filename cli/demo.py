"""``vdcompress demo``: the whole job on the checkpoint inside the package."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vdcompress import report
from vdcompress.cli import options as o
from vdcompress.cli.output import Flags, Output
from vdcompress.cli.session import session
from vdcompress.cli.show import printable
from vdcompress.runs import command

FOLDER = Path("vdcompress-demo")
NEXT = """next, on your own model (a folder, an alias or a hub id):
  vdcompress inspect MODEL             what its cache is, and what it could be
  vdcompress apply MODEL --v-dim N     compress it, measured beside the original
  vdcompress finetune                  heal the latest run
  vdcompress export                    write it for transformers"""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(demo)


def demo(
    *,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Where its runs go.")
    ] = FOLDER,
    json: o.Json = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
    debug: o.Debug = False,
) -> None:
    """Do the whole job on a small model, without a network.

    Compress, measure, heal, export, reload. The checkpoint comes with vdcompress, its text is
    the Python standard library.
    """
    with session(Flags(json, quiet, verbose, debug), lambda: kept(output)) as out:
        results = carry_out(output, out)
        found = results["export"]
        out.result(
            results,
            report.summary(results),
            f"exported to {found['folder']}, reloaded without vdcompress, it says:",
            f"  {printable(found['text'])}",
            "",
            NEXT,
        )


def carry_out(folder: Path, out: Output) -> dict[str, Any]:
    """Run the verbs one after another, as a user would, and return what they found."""
    from vdcompress.pipeline.apply import apply_recipe
    from vdcompress.pipeline.delivery import export_run
    from vdcompress.pipeline.healing import finetune_run
    from vdcompress.pipeline.healing_job import new_job
    from vdcompress.recipe import load_recipe

    recipe = load_recipe("demo")
    seconds: dict[str, float] = {}
    compressed, healed = folder / "compressed", folder / "healed"
    out.note(command("apply", "--recipe", "demo", "-o", compressed))
    applied = apply_recipe(recipe, output=compressed, force=True, on_event=out.display)
    out.note(command("finetune", compressed, "-o", healed))
    job = new_job(compressed, output=healed, force=True)
    finetuned = finetune_run(job, force=True, on_event=out.display)
    out.note(command("export", healed, "-o", folder / "export"))
    exported = export_run(healed, output=folder / "export", force=True, on_event=out.display)
    for part in (applied, finetuned, exported):
        for stage, took in part["seconds"].items():
            seconds[stage] = round(seconds.get(stage, 0.0) + took, 3)
    return exported | {"command": "demo", "seconds": seconds}


def kept(folder: Path) -> tuple[str, str]:
    """Say what an interrupted demo leaves behind."""
    if not folder.exists():
        return "nothing was written", ""
    return f"what was finished is in {folder}", "start it again with: vdcompress demo"
