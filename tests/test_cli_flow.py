"""The commands one after another, as a user types them, on tiny random models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from conftest import Vdcompress

SMALL = ("--samples", "8", "--seq-len", "64", "--windows", "2")
HEAL = ("--samples", "16", "--seq-len", "32", "--epochs", "2", "--learning-rate", "1e-3")
FIELDS = {
    "schema",
    "command",
    "run",
    "model",
    "plan",
    "parameters",
    "kv_cache",
    "perplexity",
    "positions",
    "gate",
    "seconds",
    "environment",
}


def test_apply_finetune_export_need_no_further_arguments(
    vdcompress: Vdcompress, tiny_neox: Path, text_file: Path
) -> None:
    applied = vdcompress("apply", tiny_neox, "--v-dim", "32", *SMALL, "--data", text_file)
    assert applied.code == 0, applied.err
    [run] = Path("runs").iterdir()
    assert f"written to {run}" in applied.out

    finetuned = vdcompress("finetune", *HEAL, "--json")
    assert finetuned.code == 0, finetuned.err
    assert f"run: {run}" in finetuned.err
    assert "Epoch 1: train_ppl=" in finetuned.err
    healed = finetuned.json
    assert healed["parent"] == str(run)
    assert set(healed) >= FIELDS
    perplexity = healed["perplexity"]
    assert perplexity["healed"] / perplexity["base"] == pytest.approx(perplexity["ratio"])
    saved = json.loads((run / "results.json").read_text())
    assert perplexity["compressed"] == saved["perplexity"]["compressed"]
    assert not list(Path("runs").glob("*.partial"))

    exported = vdcompress("export")
    assert exported.code == 0, exported.err
    folder = Path("exports") / Path(healed["run"]).name
    assert f"exported to {folder}" in exported.out
    assert (folder / "README.md").read_text().count("| perplexity |") == 1


def test_apply_prints_one_document(
    vdcompress: Vdcompress, tiny_llama: Path, text_file: Path
) -> None:
    ended = vdcompress(
        *("apply", tiny_llama, "--v-dim", "16", *SMALL, "--data", text_file),
        *("-o", "here", "--json", "--initializer", "pca", "--positions", "0,8,32"),
    )
    assert ended.code == 0, ended.err
    found = ended.json
    assert set(found) >= FIELDS
    assert found["run"] == "here"
    assert found["plan"]["start"] == {
        "initializer": "pca",
        "refit": "none",
        "alternate": 0,
        "seed": 0,
        "rotate": None,
    }
    assert found["kv_cache"]["reduction"] == 0.25
    assert found["kv_cache"]["measured"]["reduction"] == 0.25
    assert [bucket["to"] for bucket in found["positions"]] == [8, 32]
    assert {"load", "calibrate", "rewrite", "evaluate"} <= set(found["seconds"])
    assert json.loads(Path("here/results.json").read_text()) | {"seconds": 0} == found | {
        "seconds": 0
    }


def test_dry_run_needs_no_weights(vdcompress: Vdcompress, tiny_neox: Path, tmp_path: Path) -> None:
    config = tmp_path / "config-only"
    config.mkdir()
    (config / "config.json").write_bytes((tiny_neox / "config.json").read_bytes())
    ended = vdcompress("apply", config, "--v-dim", "32", "--dry-run", "--json")
    assert ended.code == 0, ended.err
    found = ended.json
    assert found["parameters"]["compressed"] < found["parameters"]["base"]
    assert found["kv_cache"]["bytes_per_token"] == 384
    assert found["run"] is None
    assert not Path("runs").exists()


def test_flags_beat_the_recipe_and_both_are_saved(
    vdcompress: Vdcompress, tiny_neox: Path, text_file: Path
) -> None:
    Path("mine.yaml").write_text(
        f"version: 1\nmodel: {tiny_neox}\nplan: {{v_dim: 48}}\n"
        f"calibration: {{data: {text_file}, samples: 8, seq_len: 64}}\n"
        "evaluation: {windows: 3}\ngate: {max_ratio: 0.5}\n"
    )
    ended = vdcompress(
        "apply", "--recipe", "mine.yaml", "--v-dim", "32", "--windows", "1", "-o", "r"
    )
    assert ended.code == 4
    assert "quality gate missed" in ended.err
    assert "the artefact is kept in r" in ended.err
    assert "written to r" in ended.out
    assert json.loads(Path("r/results.json").read_text())["gate"]["passed"] is False
    assert "**missed**" in Path("r/README.md").read_text()
    saved = Path("r/recipe.yaml").read_text()
    assert "v_dim: 32" in saved
    assert "windows: 1" in saved
    assert "refit: local" in saved
    assert "gate" in vdcompress("export", "r").err


def test_evaluate_measures_another_text(
    vdcompress: Vdcompress, tiny_run: Path, text_file: Path
) -> None:
    other = Path("other.txt")
    other.write_text(text_file.read_text()[5000:9000])
    ended = vdcompress("evaluate", tiny_run, "--data", other, "--windows", "1", "--json")
    assert ended.code == 0, ended.err
    assert ended.json["perplexity"]["data"] == "other.txt"
    assert ended.json["perplexity"]["tokens"] == 128
    assert sorted(Path().iterdir()) == [other]


def test_inspect_shows_a_base_and_a_run(
    vdcompress: Vdcompress, tiny_neox: Path, tiny_run: Path
) -> None:
    base = vdcompress("inspect", tiny_neox)
    assert base.code == 0, base.err
    assert "widths that V can have" in base.out
    run = vdcompress("inspect", tiny_run)
    assert run.code == 0, run.err
    for words in ("4 x 16", "4 x 8", "TRITON_ATTN_DIFFKV", "tokens per GiB"):
        assert words in run.out
    assert vdcompress("inspect", tiny_run, "--json").json["kind"] == "compressed"


def test_recipes_are_listed_shown_and_checked(vdcompress: Vdcompress) -> None:
    assert "pythia-70m-v320" in vdcompress("recipes").out
    shown = vdcompress("recipes", "show", "pythia-70m-v320")
    Path("copy.yaml").write_text(shown.out)
    assert vdcompress("recipes", "check", "copy.yaml").code == 0
    names = [recipe["name"] for recipe in vdcompress("recipes", "--json").json["recipes"]]
    assert "demo" in names


def test_quiet_says_nothing_on_stderr(
    vdcompress: Vdcompress, tiny_neox: Path, text_file: Path
) -> None:
    ended = vdcompress(
        *("apply", tiny_neox, "--v-dim", "32", *SMALL, "--data", text_file, "-q", "-o", "r")
    )
    assert ended.code == 0
    assert ended.err == ""


def test_piped_output_has_no_control_codes(vdcompress: Vdcompress, tiny_run: Path) -> None:
    ended = vdcompress("evaluate", tiny_run)
    assert ended.code == 0, ended.err
    for text in (ended.out, ended.err):
        assert all(letter.isprintable() or letter == "\n" for letter in text)
