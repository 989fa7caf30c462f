"""``recipes check``: what a recipe would build, from configs alone."""

from __future__ import annotations

from typing import Any

from vdcompress.load import BaseConfig, load_config
from vdcompress.pipeline.document import NULL, SCHEMA, described, document, parameters_of_base
from vdcompress.pipeline.scratch_settings import Scratch
from vdcompress.pipeline.settings import checked_request, plan_of, settle
from vdcompress.plan import ModelShape
from vdcompress.recipe import Recipe, model_of
from vdcompress.request import Request
from vdcompress.scratch.architecture import FAMILY

COMMAND = "recipes check"


def check_recipe(recipe: Recipe) -> dict[str, Any]:
    """Say what a recipe builds: parameters, widths, groups and bytes per token.

    Nothing is loaded but the config of the recipe's model, and none for a model from scratch.

    Returns:
        A document without figures. ``settled_by`` says what decides the widths, ``recipe`` or
        ``calibration``. In the second case ``plan`` and ``cost`` are null, of the parameters only
        the base's are known, and ``kv_cache`` holds the most bytes that are asked for.

    Raises:
        VDCompressError: the recipe is not sound, or its model's config cannot be reached.
    """
    if recipe.scratch is not None:
        scratch = Scratch.of(recipe)
        model = {"id": recipe.name or "model", "revision": None, "family": FAMILY}
        found = {"cost": scratch.cost(), "settled_by": "recipe"}
        return described(COMMAND, model, scratch.plan, scratch.counts(), **found)
    base = load_config(model_of(recipe), revision=recipe.revision)
    settled = settle(recipe, base.config)
    request = checked_request(settled, base.shape)
    if request.needs_gains(base.shape):
        return _awaiting(base, request)
    return document(COMMAND, base, plan_of(settled, base.shape), settled_by="recipe")


def _awaiting(base: BaseConfig, request: Request) -> dict[str, Any]:
    """Describe what calibration will settle."""
    known = {
        "schema": SCHEMA,
        "command": COMMAND,
        "model": {"id": base.id, "revision": base.revision, "family": base.family.model_type},
        "plan": None,
        "parameters": parameters_of_base(base),
        "kv_cache": _asked(base.shape, request),
        "cost": None,
    }
    return known | dict.fromkeys(NULL) | {"settled_by": "calibration"}


def _asked(shape: ModelShape, request: Request) -> dict[str, Any]:
    """Return the most bytes per token that a request allows, at 16 bits per number."""
    whole = 2 * shape.layers * 2 * shape.kv_dim
    if request.kv_budget is not None:
        size = 2 * int(request.kv_budget * whole / 2 + 1e-9)
    else:
        numbers = (request.v_dim or shape.kv_dim) + (request.k_dim or shape.kv_dim)
        size = 2 * shape.layers * numbers
    return {
        "base_bytes_per_token": whole,
        "bytes_per_token": size,
        "reduction": 1 - size / whole,
    }
