"""``export``: the artefact once more, where the user wants it, verified in a fresh process."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from vdcompress.artifact import load_artifact, require_free
from vdcompress.events import OnEvent, Stopwatch, Warned, ignore
from vdcompress.export import export
from vdcompress.pipeline.document import Timed
from vdcompress.pipeline.results import read_recipe, read_results
from vdcompress.plots_healing import pictures
from vdcompress.report import model_card

EXPORTS = Path("exports")


def export_run(
    run: Path, *, output: Path | None = None, force: bool = False, on_event: OnEvent = ignore
) -> dict[str, Any]:
    """Write a run as a folder that transformers loads without vdcompress, and try it out.

    Args:
        run: a finished run.
        output: the folder to write; None takes ``exports/<name of the run>``.
        force: replace what is in it.
        on_event: hears what happens.

    Returns:
        The run's results, with ``export``: folder, difference of the logits, generated text.

    Raises:
        ArtifactError: the folder does not reload to the same logits; it is not kept.
    """
    folder = output or EXPORTS / run.resolve().name
    require_free(folder, force=force)
    timed = Timed(on_event)
    results = read_results(run) | {"command": "export", "run": str(run)}
    if (gate := results.get("gate")) and not gate["passed"]:
        on_event(Warned(f"{run} missed its quality gate ({gate['ratio']:.4f} times the base's)"))
    with Stopwatch(timed).stage("load"):
        compressed = load_artifact(run)
    with Stopwatch(timed).stage("export"):
        verified = export(
            compressed,
            folder,
            results=results,
            recipe=read_recipe(run).dumps(),
            card=model_card(results),
            attached=pictures(results),
            force=force,
        )
    return results | {
        "export": asdict(verified) | {"folder": str(folder)},
        "seconds": timed.seconds,
    }
