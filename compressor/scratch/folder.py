"""The folder of a run from scratch: figures, recipe and weights, marked as no artefact to use."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from vdcompress.artifact import COMPARISON, FORMAT, MARKER, new_folder, write_weights
from vdcompress.plan import Plan
from vdcompress.report import layers, positions, summary


def write_comparison(
    folder: Path,
    model: PreTrainedModel,
    plan: Plan,
    *,
    results: Mapping[str, Any],
    recipe: str,
    force: bool = False,
) -> Path:
    """Write a trained model and its figures: all of it, or nothing.

    The weights belong to what :func:`~vdcompress.scratch.build.build` makes from the recipe.

    Args:
        folder: where; as in :func:`~vdcompress.artifact.write_artifact`.
        model: float32, trained.
        plan: what its cache keeps.
        results: for ``results.json``.
        recipe: the merged recipe's text, for ``recipe.yaml``.
        force: replace an older run.

    Raises:
        RunError: the folder is taken.
        ArtifactError: the disk is full or cannot be written.
    """
    with new_folder(folder, force=force) as partial:
        state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
        (partial / "results.json").write_text(json.dumps(results, indent=2) + "\n")
        write_weights(partial, state, like=partial / "results.json")
        (partial / "recipe.yaml").write_text(recipe)
        (partial / "README.md").write_text(card(results))
        (partial / MARKER).write_text(json.dumps(_marker(plan), indent=2) + "\n")
    return folder


def card(results: Mapping[str, Any]) -> str:
    """Return the README.md of such a folder."""
    name, reduction = results["model"]["id"], results["kv_cache"]["reduction"]
    parts = [
        f"# {name}, trained from scratch",
        "A model that began with random weights and is there to be compared with, by "
        f"`vdcompress train {name}`. Its cache is {100 * reduction:.4g}% smaller than that of the "
        "same architecture with values at full width, which stands under `base`.",
        summary(results).markdown(),
    ]
    if (table := positions(results)) is not None:
        parts += ["## Perplexity by position", table.markdown()]
    parts += ["## What the cache keeps", layers(results["plan"]).markdown()]
    parts.append("`recipe.yaml` repeats it; `results.json` holds every figure.")
    return "\n\n".join(parts) + "\n"


def _marker(plan: Plan) -> dict[str, Any]:
    from vdcompress import __version__

    return {
        "format": FORMAT,
        "vdcompress": __version__,
        COMPARISON: True,
        "base": {"id": None, "revision": None},
        "dtype": "float32",
        "calibration": "",
        "plan": plan.to_json(),
    }
