"""``export --for vllm``: maps are folded, and what vLLM cannot take is refused beforehand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import Vdcompress, tiny_settings
from vdcompress.artifact import load_artifact
from vdcompress.pipeline.apply import apply_recipe
from vdcompress.recipe import Recipe


def run_of(model: Path, text: Path, folder: Path, **plan: Any) -> Path:
    settings = tiny_settings(model, text)
    del settings["plan.v_dim"]
    settings |= {"calibration.samples": 16} | {f"plan.{key}": value for key, value in plan.items()}
    apply_recipe(Recipe().merged(settings), output=folder)
    return folder


@pytest.fixture(scope="module")
def mapped(tiny_neox: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run with one latent for all heads and a map for each."""
    folder = tmp_path_factory.mktemp("runs") / "mapped"
    return run_of(tiny_neox, text_file, folder, v_dim=40, k_dim=40, groups=1)


def test_maps_are_folded_and_said(mapped: Path, vdcompress: Vdcompress) -> None:
    before = json.loads((mapped / "results.json").read_text())
    assert before["plan"]["layers"][0]["v"]["maps"] == "per_head"
    ended = vdcompress("export", mapped, "-o", "served", "--for", "vllm", "--json")
    assert ended.code == 0, ended.err
    found = ended.json
    assert found["export"]["target"] == "vllm"
    assert found["export"]["serve"] == ["vllm serve served --trust-remote-code"]
    model = load_artifact(Path("served")).model
    names = [name for name, _ in model.named_parameters()]
    assert not any("q_expand" in name or "o_contract" in name for name in names)
    assert found["parameters"]["compressed"] == sum(p.numel() for p in model.parameters())
    assert found["parameters"]["compressed"] != before["parameters"]["compressed"]
    assert json.loads(Path("served/results.json").read_text())["plan"] == found["plan"]
    ids = torch.arange(1, 40)[None]
    with torch.inference_mode():
        change = model(ids).logits - load_artifact(mapped).model(ids).logits
    assert 0 < change.abs().max() < 0.05  # bfloat16's rounding of products


def test_what_vllm_cannot_take_is_refused_before_anything_is_written(
    tiny_neox: Path, text_file: Path, tmp_path: Path, vdcompress: Vdcompress
) -> None:
    run = run_of(tiny_neox, text_file, tmp_path / "run", v_dim=32, v_groups=1)
    ended = vdcompress("export", run, "-o", "served", "--for", "vllm")
    assert ended.code == 3
    assert "vLLM cannot serve this run" in ended.err
    assert "as many K latents as V latents, here 4 and 1" in ended.err
    assert "--for vllm" in ended.err
    assert not Path("served").exists()


def test_the_card_says_how_and_where_it_is_served(mapped: Path) -> None:
    card = (mapped / "README.md").read_text()
    assert "vllm serve . --trust-remote-code" in card
    assert "int8_per_token_head" in card
    assert "| CPU_ATTN | no |" in card  # 40 is not compiled for it
