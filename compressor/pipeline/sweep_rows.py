"""The rows of a sweep: plans, and caches of the original in few bits; each measured alike."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vdcompress import gains as losses
from vdcompress.artifact import Compressed
from vdcompress.errors import PlanError, VDCompressError
from vdcompress.evaluate import Evaluation
from vdcompress.events import (
    Event,
    OnEvent,
    Progress,
    RowEnded,
    StageEnded,
    StageStarted,
    Warned,
)
from vdcompress.load import Base
from vdcompress.pipeline.document import SCHEMA, cost, parameters
from vdcompress.pipeline.measure import Measured, measure
from vdcompress.pipeline.planning import Planned, group_counts, needed, predicted
from vdcompress.pipeline.rewriting import compressed_model
from vdcompress.pipeline.settings import checked_request, plan_of, request_of, settle
from vdcompress.pipeline.sweep_plans import label
from vdcompress.pipeline.text import Windows, evaluation_data
from vdcompress.plan import ModelShape
from vdcompress.quantized_reference import INT4, INT8, QuantizedCache, evaluate_quantized
from vdcompress.recipe import Recipe

if TYPE_CHECKING:
    from torch import Tensor

    from vdcompress.gains import LayerGains
    from vdcompress.load import BaseConfig
    from vdcompress.statistics import Statistics

DONE, FAILED, IMPOSSIBLE = "done", "failed", "impossible"
PLAN, REFERENCE = "plan", "reference"
FIGURES = (
    "plan",
    "predicted_loss",
    "parameters",
    "cost",
    "kv_cache",
    "perplexity",
    "positions",
)
SHOWN = 2
Json = dict[str, Any]


@dataclass(frozen=True)
class Work:
    """What all rows of one call share.

    Attributes:
        base: the loaded base model.
        recipe: what all rows have in common.
        windows: tokens that calibrate, with their digest.
        tokens: that measure, [n].
        statistics: of all that any row reads.
        gains: found so far, by numbers of latents.
    """

    base: Base
    recipe: Recipe
    windows: Windows
    tokens: Tensor
    statistics: Statistics
    gains: dict[tuple[int, ...], tuple[LayerGains, ...]] = field(default_factory=dict)

    def planned(self, recipe: Recipe, on_event: OnEvent) -> Planned:
        """Plan a settled recipe; gains are measured once for all plans that read the same.

        Raises:
            PlanError: what it asks for does not fit the model.
        """
        shape, request = self.base.shape, request_of(recipe)
        if not request.needs_gains(shape):
            return Planned(plan_of(recipe, shape, on_event))
        key = group_counts(request, shape)
        if key not in self.gains:
            self.gains[key] = losses.gains(shape, self.statistics, key)
        plan = plan_of(recipe, shape, on_event, self.gains[key])
        return Planned(plan, predicted(plan, self.gains[key]))


@dataclass(frozen=True)
class Reference:
    """The original model with a quantised cache, as a row."""

    cache: QuantizedCache

    @property
    def name(self) -> str:
        """What tables and files call it."""
        return self.cache.name

    @property
    def settings(self) -> Json:
        """What the row depends on, beside what all rows have in common."""
        return {"cache": {"k_bits": self.cache.k_bits, "v_bits": self.cache.v_bits}}

    def figures(self, work: Work, on_event: OnEvent) -> Json:
        """Measure it."""
        section, shape = work.recipe.evaluation, work.base.shape
        quality: Evaluation = evaluate_quantized(
            work.base.model,
            work.tokens,
            self.cache,
            window=section.seq_len,
            windows=section.windows,
            positions=section.positions,
            on_event=on_event,
        )
        found = quality.to_json(data=evaluation_data(work.recipe))
        whole, narrow = base_bytes(shape), self.cache.bytes_per_token(shape)
        cache = {"base_bytes_per_token": whole, "bytes_per_token": narrow}
        return found | {"kv_cache": cache | {"reduction": 1 - narrow / whole, "measured": None}}


@dataclass(frozen=True)
class Variant:
    """A plan to try, as a row.

    Attributes:
        recipe: settled.
        name: what tables and files call it.
        problem: why no plan can be made of it, as far as the model's shape tells; else empty.
    """

    recipe: Recipe
    name: str
    problem: str = ""

    @classmethod
    def of(cls, recipe: Recipe, config: BaseConfig) -> Variant:
        """Settle a recipe and see whether it can be planned."""
        name, settled, problem = label(recipe), settle(recipe, config.config), ""
        try:
            if not checked_request(settled, config.shape).needs_gains(config.shape):
                plan_of(settled, config.shape)
        except PlanError as error:
            problem = _first(error)
        return cls(settled, name, problem)

    @property
    def settings(self) -> Json:
        """What the row depends on, beside what all rows have in common."""
        recipe = self.recipe
        return {
            "plan": recipe.plan.model_dump(mode="json", exclude_defaults=True),
            "start": recipe.start.model_dump(mode="json"),
        }

    def needs(self, shape: ModelShape) -> frozenset[str]:
        """Return which moments it reads."""
        waits = checked_request(self.recipe, shape).needs_gains(shape)
        return needed(self.recipe, shape, None if waits else plan_of(self.recipe, shape))

    def figures(self, work: Work, on_event: OnEvent) -> Json:
        """Plan, rewrite and measure it."""
        base, planned = work.base, work.planned(self.recipe, on_event)
        plan = planned.plan
        model = compressed_model(base, plan, work.statistics, work.windows.tokens, on_event)
        compressed = Compressed.of(base, plan, model, calibration=work.windows.digest)
        measured: Measured = measure(compressed, base, work.tokens, work.recipe, on_event)
        described = {"plan": plan.to_json(), "predicted_loss": planned.predicted}
        described |= {"parameters": parameters(base, plan), "cost": cost(plan)}
        return described | measured.fields(plan, work.recipe)


Row = Reference | Variant
REFERENCES = (Reference(INT8), Reference(INT4))


@dataclass
class Listener:
    """Passes one row's events on as steps of the whole sweep.

    Attributes:
        on_event: hears them.
        row: the row's name.
        number: how many rows came before it.
        told: warnings that were passed on already, by any row.
        warnings: this row's.
    """

    on_event: OnEvent
    row: str
    number: int
    told: set[str]
    warnings: list[str] = field(default_factory=list)

    def __call__(self, event: Event) -> None:
        """Tell what the row does; repeat no warning."""
        if isinstance(event, Warned):
            self.warnings.append(event.message)
            if event.message not in self.told:
                self.told.add(event.message)
                self.on_event(event)
        elif isinstance(event, Progress):
            note = f"{self.row}: {event.note or event.stage}"
            self.on_event(Progress("sweep", self.number, note))
        elif not isinstance(event, StageStarted | StageEnded):
            self.on_event(event)


def measured(row: Row, work: Work, listener: Listener) -> Json:
    """Measure a row; whatever goes wrong is its reason.

    Returns:
        The row's document; its ``state`` is ``done``, ``failed`` or ``impossible``.
    """
    started = time.perf_counter()
    found = blank(row, DONE)
    try:
        found |= row.figures(work, listener)
    except PlanError as error:
        found = blank(row, IMPOSSIBLE, _first(error))
    except Exception as error:  # the next row may do better
        found = blank(row, FAILED, _reason(error))
    seconds = round(time.perf_counter() - started, 3)
    return found | {"warnings": listener.warnings, "seconds": seconds}


def blank(row: Row, state: str, reason: str | None = None) -> Json:
    """Return a row's document without figures."""
    kind = REFERENCE if isinstance(row, Reference) else PLAN
    head = {"schema": SCHEMA, "row": row.name, "kind": kind, "state": state}
    return (
        head
        | dict.fromkeys(FIGURES)
        | {"settings": row.settings, "reason": reason, "warnings": [], "seconds": 0}
    )


def ended(found: Json) -> RowEnded:
    """Return the event that tells how a row ended."""
    cache, perplexity = found["kv_cache"] or {}, found["perplexity"] or {}
    return RowEnded(
        row=found["row"],
        seconds=found["seconds"],
        bytes_per_token=cache.get("bytes_per_token"),
        perplexity=perplexity.get("compressed"),
        ratio=perplexity.get("ratio"),
        reason=found["reason"] or "",
    )


def base_bytes(shape: ModelShape) -> int:
    """Return the bytes per token of the base's 16-bit cache."""
    return 2 * 2 * shape.layers * shape.kv_dim


def all_needs(rows: Iterable[Row], shape: ModelShape) -> frozenset[str]:
    """Return which moments any of these rows reads."""
    tried = (row for row in rows if isinstance(row, Variant) and not row.problem)
    return frozenset().union(*(row.needs(shape) for row in tried))


def _first(error: PlanError) -> str:
    """Return the first reasons; a plan of many layers may have one for each."""
    shown, more = error.problems[:SHOWN], len(error.problems) - SHOWN
    return "; ".join(shown) + (f"; and {more} more" if more > 0 else "")


def _reason(error: Exception) -> str:
    if isinstance(error, VDCompressError):
        return error.message
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}".rstrip(": ")
