"""What a recipe says of a model from scratch, checked and as the core takes it."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

from vdcompress import families
from vdcompress.cost import base_cost, plan_cost
from vdcompress.errors import RecipeError
from vdcompress.healing.settings import HealSettings
from vdcompress.pipeline.document import counted
from vdcompress.pipeline.settings import heal_settings, request_of
from vdcompress.plan import Plan, Start, plan_for
from vdcompress.recipe import Recipe
from vdcompress.scratch.architecture import FAMILY, Architecture
from vdcompress.scratch.build import build, on_meta, shape_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Scratch:
    """What a recipe says of a model from scratch, as the core takes it.

    Attributes:
        architecture: sizes, and what becomes of values.
        plan: what its cache keeps.
        phases: how it is trained.
        seed: of the weights.
        tokenizer: where its tokenizer is.
    """

    architecture: Architecture
    plan: Plan
    phases: tuple[HealSettings, ...]
    seed: int
    tokenizer: str

    @classmethod
    def of(cls, recipe: Recipe) -> Scratch:
        """Read a recipe; no model, no tokenizer and no text is needed.

        Raises:
            RecipeError: it has no ``scratch`` section, or what it says cannot be built or trained.
            PlanError: the widths do not fit the sizes.
        """
        section = recipe.scratch
        if section is None:
            raise RecipeError("no scratch section: this recipe starts from a model")
        names = {field.name for field in fields(Architecture)}
        values = section.model_dump()
        architecture = Architecture(**{name: values[name] for name in names})
        plan = _plan(recipe, architecture, section.seed)
        _require_trainable(recipe, architecture)
        last = heal_settings(recipe)
        phases: tuple[HealSettings, ...] = (last,)
        if (first := section.first_phase) is not None:
            epochs = min(first.epochs or last.epochs, last.epochs)
            phases = (replace(last, train=first.train, epochs=epochs), last)
        return cls(architecture, plan, phases, section.seed, section.tokenizer)

    def model(self) -> PreTrainedModel:
        """Return the model with random weights."""
        return build(self.architecture, self.plan, self.seed)

    def counts(self) -> dict[str, int]:
        """Count its parameters, and those of the same model with all values at full width."""
        shape = self.plan.shape
        whole = replace(self.architecture, restore_from=None)
        base = on_meta(whole, Plan(shape, (shape.full_layout(),) * shape.layers))
        return counted(families.get(FAMILY), base, on_meta(self.architecture, self.plan))

    def cost(self) -> dict[str, dict[str, int]]:
        """Return weights and arithmetic of attention, beside those with values at full width."""
        shape, found = self.plan.shape, plan_cost(self.plan)
        if (width := self.architecture.restore_from) is not None:
            found = replace(found, v=shape.layers * width * (shape.hidden + shape.kv_dim))
        return {"base": base_cost(shape).to_json(), "compressed": found.to_json()}


def _plan(recipe: Recipe, architecture: Architecture, seed: int) -> Plan:
    """Return what the cache keeps: all of it where the recipe names no width."""
    shape, request = shape_of(architecture), request_of(recipe)
    start = Start("random", "none", 0, seed)
    if request.empty:
        return Plan(shape, (shape.full_layout(),) * shape.layers, start)
    request.require(shape)
    if request.needs_gains(shape):
        raise RecipeError(
            "a model from scratch has no activations to choose by", "name widths, not a budget"
        )
    if architecture.restore_from is not None and request.v_dim is not None:
        raise RecipeError("scratch.restore_from and plan.v_dim exclude each other")
    return plan_for(shape, request, start)


def _require_trainable(recipe: Recipe, architecture: Architecture) -> None:
    found = []
    if recipe.model is not None:
        found.append("a model beside scratch")
    if recipe.heal.distill:
        found.append("heal.distill: there is no base to learn from, set it to false")
    longest = architecture.max_position_embeddings
    found += [
        f"{name}.seq_len {length} is above max_position_embeddings {longest}"
        for name in ("heal", "evaluation")
        if (length := getattr(recipe, name).seq_len) > longest
    ]
    if found:
        raise RecipeError("; ".join(found))
    heal_settings(recipe).validate()
