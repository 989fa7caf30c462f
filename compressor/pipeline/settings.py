"""Settle what a recipe leaves open, once the model is known."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from vdcompress import initializers
from vdcompress.errors import UsageError
from vdcompress.events import OnEvent, Warned, ignore
from vdcompress.heal_settings import HealSettings
from vdcompress.plan import ModelShape, Plan, Start, make_plan, width_warnings
from vdcompress.recipe import Recipe, model_of


def settle(recipe: Recipe, config: Any, on_event: OnEvent = ignore) -> Recipe:
    """Fill in what depends on the initialiser, and cut lengths to what the model can read.

    Args:
        recipe: as merged from file and flags.
        config: of the base model; ``max_position_embeddings`` bounds every ``seq_len``.
        on_event: warned of a length that was asked for and is cut.
    """
    initializer = initializers.get(recipe.start.initializer)
    start = recipe.start
    values: dict[str, Any] = {
        "model": model_of(recipe),
        "start.refit": start.refit or initializer.default_refit,
        "start.alternate": start.alternate,
    }
    if start.alternate is None:
        local = values["start.refit"] == "local"
        values["start.alternate"] = initializer.default_alternate if local else 0
    longest = getattr(config, "max_position_embeddings", None)
    for name in ("calibration", "evaluation", "heal"):
        section = getattr(recipe, name)
        if longest and section.seq_len > longest:
            values[f"{name}.seq_len"] = longest
            if section.seq_len != type(section).model_fields["seq_len"].default:
                on_event(
                    Warned(f"{name}.seq_len {section.seq_len} is cut to the model's {longest}")
                )
    return recipe.merged(values)


def plan_of(recipe: Recipe, shape: ModelShape, on_event: OnEvent = ignore) -> Plan:
    """Return the plan of a settled recipe.

    Raises:
        UsageError: no width was asked for.
        PlanError: the width does not fit the model.
    """
    if recipe.plan.v_dim is None:
        step, full = 8 * shape.kv_heads, shape.kv_dim
        half = max(step, round(full * 0.625 / step) * step)
        raise UsageError(f"how wide? V has {full} dimensions here", f"try: --v-dim {half}")
    start = Start(
        initializer=recipe.start.initializer,
        refit=recipe.start.refit or "none",
        alternate=recipe.start.alternate or 0,
        seed=recipe.start.seed,
    )
    plan = make_plan(shape, v_dim=recipe.plan.v_dim, start=start)
    for warning in width_warnings(plan):
        on_event(Warned(warning))
    return plan


def heal_settings(recipe: Recipe) -> HealSettings:
    """Return the recipe's ``heal`` section as the core takes it."""
    known = {field.name for field in fields(HealSettings)}
    section = recipe.heal.model_dump()
    return HealSettings(**{name: value for name, value in section.items() if name in known})
