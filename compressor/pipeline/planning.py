"""Plan once calibration has measured: gains, the plan that they decide, and what it loses."""

from __future__ import annotations

from dataclasses import dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING, Any

from vdcompress import gains as measured
from vdcompress.allocate import predicted_loss
from vdcompress.budget import divisors
from vdcompress.events import OnEvent, Stopwatch, Warned, ignore
from vdcompress.pipeline.settings import checked_request, plan_of, start_of
from vdcompress.plan import ModelShape, Plan
from vdcompress.recipe import Recipe
from vdcompress.request import Request
from vdcompress.rewrite import needed_statistics

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vdcompress.gains import LayerGains
    from vdcompress.load import Base
    from vdcompress.statistics import Statistics

HINT_WIDTH = 2048
TRUSTED_TOKENS = 64  # per dimension of V


@dataclass(frozen=True)
class Planned:
    """A plan and what calibration says of it; both None where nothing was predicted.

    Attributes:
        plan: the plan.
        predicted: JSON: ``total`` nats per token, by part, and by layer and part.
        shared: JSON: which share of the attention's output the same bytes of V leave out, per head
            and in one latent of all heads; the mean over layers.
    """

    plan: Plan
    predicted: dict[str, Any] | None = None
    shared: dict[str, Any] | None = None


def plan_measured(
    base: Base, recipe: Recipe, statistics: Statistics, on_event: OnEvent = ignore
) -> Planned:
    """Plan a request that needs gains: measure them, and allocate by them.

    Args:
        base: the loaded model.
        recipe: settled.
        statistics: of all sides.
        on_event: hears what happens.

    Raises:
        PlanError: what was asked for does not fit the model.
    """
    shape, request = base.shape, checked_request(recipe, base.shape)
    if statistics.tokens < TRUSTED_TOKENS * shape.kv_dim:
        on_event(
            Warned(
                f"{statistics.tokens} calibration tokens are few: the predicted loss will be too "
                f"low, and so may be the quality; {TRUSTED_TOKENS * shape.kv_dim} or more are "
                "better (--samples, --seq-len)"
            )
        )
    with Stopwatch(on_event).stage("plan"):
        counts = group_counts(request, shape)
        gains = measured.gains(shape, statistics, counts)
        plan = plan_of(recipe, shape, on_event, gains)
    return Planned(plan, predicted(plan, gains))


def with_shared_hint(
    planned: Planned, base: Base, recipe: Recipe, statistics: Statistics, on_event: OnEvent
) -> Planned:
    """Add what a bare ``--v-dim`` would lose in one latent of all heads, where that is cheap."""
    shape, request = base.shape, checked_request(recipe, base.shape)
    measured_there = statistics.layers[0].values or (
        statistics.layers[0].outputs if shape.heads == shape.kv_heads else None
    )
    if not wants_hint(request, shape) or measured_there is None:
        return planned
    with Stopwatch(on_event).stage("compare"):
        found = measured.output_shares(base, statistics, (1, shape.kv_heads))
    width, heads = request.v_dim or 0, shape.kv_heads
    left_out = {
        "per_head": fmean(layer[heads][width // heads] for layer in found),
        "shared": fmean(layer[1][width] for layer in found),
    }
    return replace(planned, shared={"v_groups": 1, "v_dim": width, "left_out": left_out})


def needed(recipe: Recipe, shape: ModelShape, plan: Plan | None) -> frozenset[str]:
    """Return which statistics planning and rewriting will read.

    Args:
        recipe: settled.
        shape: of the base.
        plan: what is known already; None where it waits for the statistics.
    """
    needs = needed_statistics(start_of(recipe), shape, plan)
    return needs if plan is not None else needs | measured.NEEDS


def wants_hint(request: Request, shape: ModelShape) -> bool:
    """Say whether a request narrows V alone, with a latent for each head, and is small enough."""
    return (
        request == Request(v_dim=request.v_dim)
        and shape.kv_heads > 1
        and (request.v_dim or 0) < shape.kv_dim <= HINT_WIDTH
    )


def group_counts(request: Request, shape: ModelShape) -> tuple[int, ...]:
    """Return the numbers of latents whose gains a plan reads."""
    asked = (request.v_groups, request.k_groups)
    if request.kv_budget is not None:
        free = set(divisors(shape.kv_heads)) if None in asked else set()
        return tuple(sorted(free | {groups for groups in asked if groups}))
    return tuple(sorted(set(request.groups(shape))))


def predicted(plan: Plan, gains: Sequence[LayerGains]) -> dict[str, Any]:
    """Return the loss that gains predict for a plan, in nats per token."""
    layers = predicted_loss(plan.layers, gains)
    parts = {name: sum(layer[name] for layer in layers) for name in layers[0]}
    return {"total": sum(parts.values()), **parts, "layers": list(layers)}
