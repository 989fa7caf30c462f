"""Recipes: everything that decides a result, in one YAML file.

A recipe is read strictly: unknown keys, wrong values and future versions are refused in one
:class:`RecipeError` that names all of them. What a run was made with is saved beside it, so every
run can be repeated from its own folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator

from vdcompress.errors import OptionError, RecipeError, UsageError, did_you_mean
from vdcompress.healing.settings import HealSettings, Schedule, Target, Train
from vdcompress.recipe_section import Count, Positive, Section, Seed, Share, Weight
from vdcompress.scratch.section import ScratchSection

VERSION = 1
DEFAULT_DATA = "Salesforce/wikitext:wikitext-2-raw-v1"
DEFAULT_POSITIONS = (0, 16, 32, 64, 96, 128)
SUFFIXES = (".yaml", ".yml")
HEALED_AS = ("text_field", "evaluation", "heal", "gate")

Bits = Literal[16, 8, 4, 3, 2]
Tokens = Annotated[int, Field(ge=0)]


class PlanSection(Section):
    """What the cache keeps; widths count over all latents of a layer, null leaves a side whole.

    ``groups`` is for every side that changes, ``v_groups`` and ``k_groups`` for one of them.
    ``kv_budget`` is a fraction of the base's bytes per token, in place of widths. Latents of fewer
    than 16 bits are packed, but for the first tokens (``sinks``) and the newest (``window``).
    """

    v_dim: int | None = None
    k_dim: int | None = None
    groups: int | None = None
    v_groups: int | None = None
    k_groups: int | None = None
    k_rotary_dim: int | None = None
    kv_budget: float | None = None
    allocation: Literal["uniform", "layers"] | None = None
    bits: Bits | Literal["auto"] | None = None
    v_bits: Bits | None = None
    k_bits: Bits | None = None
    k_rotary_bits: Bits | None = None
    sinks: Tokens | None = None
    window: Tokens | None = None
    target: Literal["transformers", "vllm"] = "transformers"


class StartSection(Section):
    """How compressed weights are found; null takes the initialiser's own default,
    and of initialisers the one that suits the plan."""

    initializer: str | None = None
    refit: Literal["none", "local"] | None = None
    alternate: Annotated[int, Field(ge=0)] | None = None
    seed: Seed = 0


class CalibrationSection(Section):
    """Which text calibrates: ``samples`` windows of ``seq_len`` tokens at random places.

    A document is drawn in proportion to its length to the power ``balance``: a few long ones do
    not crowd out the many short ones.
    """

    data: str = DEFAULT_DATA
    samples: Count = 64
    seq_len: Annotated[int, Field(ge=2)] = 2048
    balance: Annotated[float, Field(ge=0, le=1)] = 0.5
    seed: Seed = 0


class EvaluationSection(Section):
    """Which text measures; ``data`` null is the held-out part of the calibration's text."""

    data: str | None = None
    windows: Count = 24
    seq_len: Annotated[int, Field(ge=2)] = 2048
    positions: tuple[Annotated[int, Field(ge=0)], ...] = DEFAULT_POSITIONS

    @field_validator("positions")
    @classmethod
    def _ascending(cls, positions: tuple[int, ...]) -> tuple[int, ...]:
        if len(positions) < 2 or list(positions) != sorted(set(positions)):
            raise ValueError("needs two or more ascending positions")
        return positions


class TrainingSection(Section):
    """How weights are trained; each key is explained at :class:`HealSettings`."""

    epochs: Count = HealSettings.epochs
    patience: Count = HealSettings.patience
    learning_rate: Positive = HealSettings.learning_rate
    latents_rate: Positive = HealSettings.latents_rate
    attention_rate: Positive = HealSettings.attention_rate
    body_rate: Positive = HealSettings.body_rate
    embeddings_rate: Positive = HealSettings.embeddings_rate
    batch_size: Count = HealSettings.batch_size
    micro_batch: Count | None = HealSettings.micro_batch
    distill: bool = HealSettings.distill
    target: Target = HealSettings.target
    kl_weight: Weight = HealSettings.kl_weight
    ce_weight: Weight = HealSettings.ce_weight
    hidden_weight: Weight | None = HealSettings.hidden_weight
    temperature: Positive = HealSettings.temperature
    teacher_top_k: Count | None = HealSettings.teacher_top_k
    schedule: Schedule = HealSettings.schedule
    warmup_ratio: Share = HealSettings.warmup_ratio
    weight_decay: Weight = HealSettings.weight_decay
    max_grad_norm: Weight = HealSettings.max_grad_norm
    train: Train = HealSettings.train
    seed: Seed = HealSettings.seed
    bf16: bool | None = HealSettings.bf16
    gradient_checkpointing: bool = HealSettings.gradient_checkpointing
    max_steps: Count | None = HealSettings.max_steps
    save_steps: Count | None = HealSettings.save_steps


class HealSection(TrainingSection):
    """How a finetune heals; ``data`` null is the training part of the calibration's text.

    Where the text has more than ``samples`` sequences, a document is drawn in proportion to its
    length to the power ``balance``, nothing of it twice.

    ``report_to`` names trackers such as ``tensorboard``, which write into the run's ``logs``.
    """

    data: str | None = None
    samples: Count = 20_000
    validation_samples: Count = 500
    seq_len: Annotated[int, Field(ge=2)] = 512
    balance: Annotated[float, Field(ge=0, le=1)] = 0.5
    report_to: tuple[str, ...] = ()


class GateSection(Section):
    """The quality that a run must have: the largest ratio of its perplexity to the base's."""

    max_ratio: Positive


class Recipe(Section):
    """One experiment, from the checkpoint to the gate."""

    version: int = VERSION
    name: str = ""
    description: str = ""
    model: str | None = None
    revision: str | None = None
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    text_field: str = "text"
    plan: PlanSection = PlanSection()
    start: StartSection = StartSection()
    calibration: CalibrationSection = CalibrationSection()
    evaluation: EvaluationSection = EvaluationSection()
    heal: HealSection = HealSection()
    gate: GateSection | None = None
    scratch: ScratchSection | None = None

    def merged(self, overrides: Mapping[str, Any]) -> Recipe:
        """Return this recipe with some values replaced.

        Args:
            overrides: ``{"plan.v_dim": 320, "model": "pythia-70m"}``; None keeps what stands.

        Raises:
            OptionError: for a key or a value that no recipe takes.
        """
        data = self.model_dump()
        for path, value in overrides.items():
            if value is not None:
                *sections, key = path.split(".")
                target = data
                for section in sections:
                    target[section] = target.get(section) or {}
                    target = target[section]
                target[key] = value
        return parse(data, "these options", OptionError)

    def healed_as(self, other: Recipe) -> Recipe:
        """Return this recipe with what another one says about healing and measuring.

        Args:
            other: what its file names of ``heal``, ``evaluation``, ``gate`` and ``text_field``
                counts, null too; keys that it leaves out stay as they are here.

        Raises:
            RecipeError: together they are no recipe.
        """
        said = other.model_dump(exclude_unset=True, include=set(HEALED_AS))
        data = self.model_dump()
        for name, value in said.items():
            both = isinstance(value, dict) and data[name] is not None
            data[name] = data[name] | value if both else value
        return parse(data, "both recipes together")

    def dumps(self) -> str:
        """Return the whole recipe as YAML, defaults included."""
        text: str = yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, width=96)
        return text


def model_of(recipe: Recipe) -> str:
    """Return the recipe's model.

    Raises:
        UsageError: it names none, or it trains one from scratch.
    """
    if recipe.scratch is not None:
        raise UsageError(
            f"recipe {recipe.name or 'given'} trains a model from scratch: there is none to start "
            "from",
            f"run it with: vdcompress train {recipe.name or 'RECIPE'}",
        )
    if recipe.model is None:
        raise UsageError("which model? neither MODEL nor a recipe names one", "try: pythia-70m")
    return recipe.model


def parse(data: Any, origin: str, wrong: type[RecipeError] = RecipeError) -> Recipe:
    """Read a recipe from plain values.

    Args:
        data: what the YAML holds, a mapping.
        origin: what to call it in errors.
        wrong: what is raised.

    Raises:
        RecipeError: naming everything that is wrong.
    """
    if not isinstance(data, dict):
        raise RecipeError(f"{origin} is not a recipe: no keys in it", "see: vdcompress recipes")
    _check_version(data.get("version"), origin)
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        problems = "; ".join(_problem(detail) for detail in error.errors())
        where = "the command's --help" if wrong is OptionError else "vdcompress recipes show NAME"
        raise wrong(f"{origin}: {problems}", f"see: {where}") from error


def load_recipe(name: str | Path) -> Recipe:
    """Read a recipe that is shipped (``pythia-70m-v320``) or a YAML file.

    Raises:
        RecipeError: unknown name, unreadable file, or anything that :func:`parse` refuses.
    """
    text, origin = _read(name)
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" (line {mark.line + 1})" if mark else ""
        raise RecipeError(f"{origin} is not YAML{line}") from error
    return parse(data, origin)


def load_scratch_recipe(name: str | Path) -> Recipe:
    """Read a recipe that trains a model from scratch.

    Raises:
        UsageError: it starts from a model.
        RecipeError: as :func:`load_recipe` raises.
    """
    recipe = load_recipe(name)
    if recipe.scratch is None:
        raise UsageError(
            f"recipe {name} has no scratch section: it starts from a model",
            f"use it with: vdcompress apply --recipe {name}",
        )
    return recipe


def shipped() -> tuple[str, ...]:
    """Return the names of the recipes in the package."""
    files = resources.files("vdcompress.recipes").iterdir()
    return tuple(sorted(Path(file.name).stem for file in files if file.name.endswith(SUFFIXES)))


def _read(name: str | Path) -> tuple[str, str]:
    """Return a recipe's text and what to call it."""
    if str(name) in shipped():
        file = resources.files("vdcompress.recipes") / f"{name}.yaml"
        return file.read_text(encoding="utf-8"), f"recipe {name}"
    path = Path(name)
    if path.is_dir():
        raise RecipeError(f"recipe {path} is a folder, not a YAML file")
    if path.suffix not in SUFFIXES and not path.is_file():
        raise RecipeError(
            f"no recipe {str(name)!r}: {did_you_mean(str(name), shipped())}",
            "list them with: vdcompress recipes",
        )
    try:
        return path.read_text(encoding="utf-8"), f"recipe {path}"
    except UnicodeDecodeError as error:
        raise RecipeError(f"recipe {path} is not text") from error
    except OSError as error:
        raise RecipeError(f"recipe {path} cannot be read: {error.strerror}") from error


def _check_version(version: Any, origin: str) -> None:
    if version is None:
        raise RecipeError(f"{origin} does not say its version", f"add the line: version: {VERSION}")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise RecipeError(f"{origin}: version {version!r} is not a number from 1 on")
    if version > VERSION:
        raise RecipeError(
            f"{origin} is of version {version}, this vdcompress reads up to version {VERSION}",
            "install a newer vdcompress",
        )


def _problem(detail: Any) -> str:
    """Say one of pydantic's findings in our words."""
    path = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        return f"unknown key {path!r}, {did_you_mean(str(detail['loc'][-1]), _keys(detail['loc']))}"
    if detail["type"] == "missing":
        return f"{path} is missing"
    if detail["type"] in ("model_type", "dict_type"):
        return f"{path} must hold keys (found {detail['input']!r})"
    message = detail["msg"].removeprefix("Value error, ")
    return f"{path}: {message[0].lower()}{message[1:]} (found {detail['input']!r})"


def _keys(location: tuple[str | int, ...]) -> list[str]:
    """Return the keys that are valid where ``location`` points."""
    sections: dict[str, type[BaseModel]] = {
        "plan": PlanSection,
        "start": StartSection,
        "calibration": CalibrationSection,
        "evaluation": EvaluationSection,
        "heal": HealSection,
        "gate": GateSection,
        "scratch": ScratchSection,
    }
    section = sections.get(str(location[0]), Recipe) if len(location) > 1 else Recipe
    return list(section.model_fields)
