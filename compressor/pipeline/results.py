"""Read what a run folder says about itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from vdcompress.errors import RunError
from vdcompress.pipeline.figures import first_fault
from vdcompress.recipe import Recipe, parse

RESULTS = "results.json"
RECIPE = "recipe.yaml"
NEEDED = {"model", "parameters", "kv_cache", "plan", "seconds"}  # whatever made the run


def read_results(run: Path) -> dict[str, Any]:
    """Return a run's ``results.json``.

    Raises:
        RunError: it is missing or damaged.
    """
    try:
        found = json.loads((run / RESULTS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _unreadable(run) from error
    if not isinstance(found, dict) or not found.keys() >= NEEDED:
        raise _unreadable(run)
    fault = first_fault(found)
    if fault:
        raise RunError(f"{run / RESULTS} is damaged: {fault}", "make the run again")
    return found


def _unreadable(run: Path) -> RunError:
    return RunError(f"{run} has no readable {RESULTS}", "make the run again")


def read_recipe(run: Path) -> Recipe:
    """Return the recipe that a run was made with.

    Raises:
        RunError: it is missing.
        RecipeError: it is damaged.
    """
    try:
        text = (run / RECIPE).read_text(encoding="utf-8")
        data = yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise RunError(f"{run} has no readable {RECIPE}", "make the run again") from error
    return parse(data, f"recipe {run / RECIPE}")
