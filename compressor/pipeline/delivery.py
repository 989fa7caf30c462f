"""``export``: the artefact once more, where the user wants it, verified in a fresh process."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from vdcompress import families, serving
from vdcompress.artifact import Compressed, load_artifact, read_marker, require_free
from vdcompress.card import model_card
from vdcompress.errors import ModelError
from vdcompress.events import OnEvent, Stopwatch, Warned, ignore
from vdcompress.export import export
from vdcompress.folding import folded, folded_plan
from vdcompress.pipeline.document import Timed, compressed_parameters, cost
from vdcompress.pipeline.results import read_recipe, read_results
from vdcompress.plan import Plan
from vdcompress.plots_healing import pictures
from vdcompress.request import TRANSFORMERS, VLLM

EXPORTS = Path("exports")


def export_run(
    run: Path,
    *,
    output: Path | None = None,
    target: str = TRANSFORMERS,
    force: bool = False,
    on_event: OnEvent = ignore,
) -> dict[str, Any]:
    """Write a run as a folder that transformers loads without vdcompress, and try it out.

    Args:
        run: a finished run.
        output: the folder to write; None takes ``exports/<name of the run>``.
        target: ``vllm`` folds maps per head where they can be, and refuses what vLLM cannot take.
        force: replace what is in it.
        on_event: hears what happens.

    Returns:
        The run's results, with ``export``: folder, difference of the logits, generated text, the
        target and ``serve``, what to type to serve it with vLLM.

    Raises:
        ModelError: no backend of vLLM takes the run, and it is the target.
        ArtifactError: the folder does not reload to the same logits; it is not kept.
    """
    folder = output or EXPORTS / run.resolve().name
    require_free(folder, force=force)
    plan = Plan.from_json(read_marker(run)["plan"])
    if target == VLLM:
        plan = folded_plan(plan)
        _require_vllm(plan)
    timed = Timed(on_event)
    results = read_results(run) | {"command": "export", "run": str(run)}
    if (gate := results.get("gate")) and not gate["passed"]:
        on_event(Warned(f"{run} missed its quality gate ({gate['ratio']:.4f} times the base's)"))
    with Stopwatch(timed).stage("load"):
        compressed = load_artifact(run)
    if target == VLLM:
        compressed = folded(compressed)
        results |= _described(compressed, results)
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
        "export": asdict(verified)
        | {
            "folder": str(folder),
            "target": target,
            "serve": serving.vllm_commands(serving.verdicts(plan.layers), str(folder)),
        },
        "seconds": timed.seconds,
    }


def _require_vllm(plan: Plan) -> None:
    """Raise :class:`ModelError` with every reason unless some backend of vLLM takes the plan."""
    found = [v for v in serving.verdicts(plan.layers) if v.engine == serving.VLLM]
    if not any(verdict.serves for verdict in found):
        reasons = dict.fromkeys(verdict.note for verdict in found)
        problems = serving.vllm_problems(plan.layers) or list(reasons)
        raise ModelError(
            f"vLLM cannot serve this run: {'; '.join(problems)}",
            "plan it for vLLM: vdcompress apply MODEL --kv-budget 0.5 --for vllm",
        )


def _described(compressed: Compressed, results: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a document that folding changes."""
    plan = compressed.plan
    family = families.get(plan.shape.family)
    counted = compressed_parameters(family, compressed.model)
    return {
        "plan": plan.to_json(),
        "parameters": results["parameters"] | counted,
        "cost": cost(plan),
    }
