"""Recipes are read strictly, merged with flags, and written whole."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from vdcompress.cli.options import Allocation, Refit, Target
from vdcompress.errors import OptionError, RecipeError
from vdcompress.healing.settings import HealSettings
from vdcompress.pipeline.settings import heal_settings
from vdcompress.recipe import (
    HealSection,
    PlanSection,
    Recipe,
    load_recipe,
    parse,
    shipped,
)
from vdcompress.request import ALLOCATIONS, TARGETS, Request
from vdcompress.scratch.architecture import Architecture
from vdcompress.scratch.section import ScratchSection

NOT_IN_RECIPES = {"chunk_tokens"}
FOR_ANY_RUN = ("long",)


@pytest.mark.parametrize("name", shipped())
def test_every_shipped_recipe_is_sound_and_carries_its_file_name(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.description
    if name in FOR_ANY_RUN:
        assert recipe.model_fields_set == {"version", "name", "description", "heal"}
    else:
        assert (recipe.model is None) == (recipe.scratch is not None)
        assert recipe.scratch or not Request.of(**recipe.plan.model_dump()).empty


def test_a_recipe_survives_being_written() -> None:
    recipe = load_recipe("demo").merged({"gate.max_ratio": 1.05, "evaluation.positions": (0, 8)})
    assert parse(yaml.safe_load(recipe.dumps()), "again") == recipe


def test_flags_beat_the_recipe_and_none_keeps_it() -> None:
    merged = load_recipe("pythia-70m-v320").merged({"plan.v_dim": 256, "model": None})
    assert (merged.plan.v_dim, merged.model) == (256, "pythia-70m")


def test_the_heal_section_has_every_setting_with_its_default() -> None:
    section = HealSection()
    for field in fields(HealSettings):
        if field.name not in NOT_IN_RECIPES:
            assert getattr(section, field.name) == getattr(HealSettings(), field.name)


def test_a_finetune_spends_ten_million_tokens() -> None:
    heal = HealSection()
    assert heal.epochs * heal.samples * heal.seq_len == 10_240_000


def test_a_long_finetune_is_the_default_with_more_tokens() -> None:
    other = {
        "distill": False, "target": "layers", "kl_weight": 2.0, "ce_weight": 1.0, "train": "all",
        "hidden_weight": 3.0, "teacher_top_k": 8, "schedule": "wsd", "learning_rate": 1e-5,
        "body_rate": 1.0, "warmup_ratio": 0.5, "epochs": 3, "seq_len": 64, "batch_size": 2,
    }  # fmt: skip
    own = Recipe(model="a", plan=PlanSection(v_dim=8)).merged(
        {f"heal.{name}": value for name, value in other.items()}
    )

    found = own.healed_as(load_recipe("long"))

    assert found.model_copy(update={"heal": own.heal}) == own
    settings = heal_settings(found)
    settings.validate()
    longer = HealSettings(batch_size=32, save_steps=1000)
    assert settings == longer.settled()
    heal = found.heal
    assert heal.seq_len == HealSection().seq_len
    assert heal.samples == settings.steps_per_epoch(heal.samples) * settings.batch_size
    assert settings.total_steps(heal.samples) * settings.batch_size * heal.seq_len == 102_400_000


def test_the_scratch_section_has_every_size_with_its_default() -> None:
    section = ScratchSection()
    assert set(ScratchSection.model_fields) == {
        *(field.name for field in fields(Architecture)),
        *("tokenizer", "seed", "first_phase"),
    }
    for field in fields(Architecture):
        assert getattr(section, field.name) == getattr(Architecture(), field.name)


def test_the_plan_section_has_every_part_of_a_request() -> None:
    names = {field.name for field in fields(Request)}
    assert set(PlanSection.model_fields) == names | {"groups"}
    assert Request.of(**PlanSection().model_dump()) == Request()


def test_flags_offer_what_recipes_take() -> None:
    def taken(path: str, values: Iterable[str]) -> None:
        for value in values:
            Recipe().merged({path: value})

    assert (tuple(Allocation), tuple(Target)) == (ALLOCATIONS, TARGETS)
    taken("plan.allocation", Allocation)
    taken("plan.target", Target)
    taken("start.refit", Refit)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ({"version": 1, "plan": {"target": "tgi"}}, "plan.target: input should be"),
        ({"version": 1, "plan": {"k_dims": 1}}, "did you mean 'k_dim'?"),
        ({"version": 1, "scratch": {"hiden_size": 8}}, "did you mean 'hidden_size'?"),
        ({"version": 1, "calibraton": {}}, "unknown key 'calibraton', did you mean 'calibration'?"),
        (
            {"version": 1, "heal": {"learning_rat": 1}},
            "unknown key 'heal.learning_rat', did you mean 'learning_rate'?",
        ),
        ({"version": 2}, "of version 2, this vdcompress reads up to version 1"),
        ({"version": "new"}, "version 'new' is not a number"),
        ({"model": "demo"}, "does not say its version"),
        ({"version": 1, "plan": 3}, "plan must hold keys"),
        ({"version": 1, "calibration": {"samples": 0}}, "calibration.samples: input should be"),
        ({"version": 1, "evaluation": {"positions": [5, 5]}}, "ascending positions"),
        ({"version": 1, "gate": {}}, "gate.max_ratio is missing"),
        (None, "not a recipe"),
        (["version"], "not a recipe"),
    ],
)
def test_what_is_wrong_is_said(data: Any, says: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse(data, "recipe x.yaml")
    assert says in caught.value.message
    assert "x.yaml" in caught.value.message
    assert "\n" not in caught.value.message


def test_all_problems_are_said_at_once() -> None:
    with pytest.raises(RecipeError) as caught:
        parse({"version": 1, "gat": {}, "heal": {"epochs": 0}, "dtype": "int8"}, "x")
    for name in ("gat", "heal.epochs", "dtype"):
        assert name in caught.value.message


def test_a_folder_is_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="is a folder, not a YAML file"):
        load_recipe(tmp_path)


def test_an_unknown_name_gets_the_nearest_one() -> None:
    with pytest.raises(RecipeError, match="did you mean 'pythia-70m-v320'"):
        load_recipe("pythia-70m-v32")


@pytest.mark.parametrize(
    ("content", "says"),
    [(b"a: [", "is not YAML"), (b"\xff\xfe\x00", "is not text"), (b"", "not a recipe")],
)
def test_files_that_are_no_recipes(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(content)
    with pytest.raises(RecipeError, match=says):
        load_recipe(path)


def test_a_missing_file_is_said() -> None:
    with pytest.raises(RecipeError, match="cannot be read: No such file"):
        load_recipe("nowhere.yaml")


def test_overrides_are_checked_like_files() -> None:
    with pytest.raises(OptionError, match=r"calibration\.samples") as caught:
        Recipe().merged({"calibration.samples": -1})
    assert caught.value.exit_code == 2
