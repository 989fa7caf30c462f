"""Read what a run folder says about itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from vdcompress.errors import RunError
from vdcompress.recipe import Recipe, parse

RESULTS = "results.json"
RECIPE = "recipe.yaml"


def read_results(run: Path) -> dict[str, Any]:
    """Return a run's ``results.json``.

    Raises:
        RunError: it is missing or damaged.
    """
    try:
        found: dict[str, Any] = json.loads((run / RESULTS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{run} has no readable {RESULTS}", "make the run again") from error
    return found


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
