"""Settle what a recipe leaves open, once the model is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from vdcompress import initializers
from vdcompress.errors import UsageError
from vdcompress.events import OnEvent, Warned, ignore
from vdcompress.healing.settings import HealSettings
from vdcompress.plan import ModelShape, Plan, Start, plan_for, width_warnings
from vdcompress.recipe import Recipe, model_of
from vdcompress.request import Request

if TYPE_CHECKING:
    from vdcompress.gains import LayerGains


def settle(recipe: Recipe, config: Any, on_event: OnEvent = ignore) -> Recipe:
    """Fill in what depends on the initialiser, and cut lengths to what the model can read.

    Args:
        recipe: as merged from file and flags.
        config: of the base model; ``max_position_embeddings`` bounds every ``seq_len``.
        on_event: warned of a length that was asked for and is cut.
    """
    start = recipe.start
    name = start.initializer or request_of(recipe).default_initializer
    initializer = initializers.get(name)
    values: dict[str, Any] = {
        "model": model_of(recipe),
        "start.initializer": name,
        "start.refit": start.refit or initializer.default_refit,
        "start.alternate": start.alternate,
    }
    if start.alternate is None:
        refitted = values["start.refit"] != "none"
        values["start.alternate"] = initializer.default_alternate if refitted else 0
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


def request_of(recipe: Recipe) -> Request:
    """Return the recipe's ``plan`` section as the core takes it."""
    return Request.of(**recipe.plan.model_dump())


def start_of(recipe: Recipe) -> Start:
    """Return the ``start`` section of a settled recipe as the core takes it."""
    section = recipe.start
    return Start(
        initializer=section.initializer or request_of(recipe).default_initializer,
        refit=section.refit or "none",
        alternate=section.alternate or 0,
        seed=section.seed,
    )


def plan_of(
    recipe: Recipe,
    shape: ModelShape,
    on_event: OnEvent = ignore,
    gains: Sequence[LayerGains] | None = None,
) -> Plan:
    """Return the plan of a settled recipe.

    Args:
        recipe: settled.
        shape: of the base.
        on_event: warned of widths that cost speed.
        gains: of every layer, where :meth:`Request.needs_gains` asks for them.

    Raises:
        UsageError: no width was asked for.
        PlanError: what was asked for does not fit the model, or it needs gains.
    """
    plan = plan_for(shape, checked_request(recipe, shape), start_of(recipe), gains)
    for warning in width_warnings(plan):
        on_event(Warned(warning))
    return plan


def checked_request(recipe: Recipe, shape: ModelShape) -> Request:
    """Return what a recipe asks for, once it is known to fit the model.

    Raises:
        UsageError: no width was asked for.
        PlanError: what was asked for does not fit the model.
    """
    request = request_of(recipe)
    if request.empty:
        step, full = 8 * shape.kv_heads, shape.kv_dim
        half = max(step, round(full * 0.625 / step) * step)
        raise UsageError(
            f"how wide? V has {full} dimensions here", f"try: --v-dim {half}, or --v-bits 4"
        )
    request.require(shape)
    return request


def heal_settings(recipe: Recipe) -> HealSettings:
    """Return the recipe's ``heal`` section as the core takes it, with nothing left open."""
    known = {field.name for field in fields(HealSettings)}
    section = recipe.heal.model_dump()
    found = HealSettings(**{name: value for name, value in section.items() if name in known})
    return found.settled()
