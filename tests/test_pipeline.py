"""The library's side of the verbs."""

from __future__ import annotations

import json
from pathlib import Path

import vdcompress
from conftest import tiny_settings
from vdcompress.events import Event, StageStarted
from vdcompress.pipeline.apply import apply_recipe, preview
from vdcompress.recipe import Recipe


def test_compress_does_it_in_one_call(tiny_llama: Path, text_file: Path) -> None:
    settings = tiny_settings(tiny_llama, text_file)
    heard: list[Event] = []
    overrides = {name: settings[name] for name in settings if name.startswith("calibration")}
    compressed = vdcompress.compress(
        str(tiny_llama), v_dim=16, overrides=overrides, on_event=heard.append
    )
    assert {layer.v_head_dim for layer in compressed.plan.layers} == {8}
    assert compressed.base_id == str(tiny_llama)
    stages = [event.stage for event in heard if isinstance(event, StageStarted)]
    assert stages == ["load", "read text", "calibrate", "rewrite"]


def test_the_preview_counts_what_apply_makes(
    tiny_neox: Path, text_file: Path, tiny_run: Path
) -> None:
    planned = preview(Recipe().merged(tiny_settings(tiny_neox, text_file)))
    made = json.loads((tiny_run / "results.json").read_text())
    assert planned["parameters"] == made["parameters"]
    assert planned["plan"] == made["plan"]
    for name in ("base_bytes_per_token", "bytes_per_token", "reduction"):
        assert planned["kv_cache"][name] == made["kv_cache"][name]
    assert made["kv_cache"]["measured"]["bytes_per_token"] == planned["kv_cache"]["bytes_per_token"]


def test_the_saved_recipe_repeats_the_run(tiny_run: Path, tmp_path: Path) -> None:
    from vdcompress.recipe import load_recipe

    again = apply_recipe(load_recipe(tiny_run / "recipe.yaml"), output=tmp_path / "again")
    made = json.loads((tiny_run / "results.json").read_text())
    for name in ("plan", "perplexity", "positions", "kv_cache", "parameters"):
        assert again[name] == made[name]
    weights = "model.safetensors"
    assert (tmp_path / "again" / weights).read_bytes() == (tiny_run / weights).read_bytes()
