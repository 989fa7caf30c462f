"""Runs side by side: their figures as they are, what is refused, what cannot be compared."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import Vdcompress
from test_bad_input import assert_refused
from vdcompress import comparison_report, plots_comparison
from vdcompress.pipeline.comparison import compare_runs, labels
from vdcompress.pipeline.healing import finetune_run
from vdcompress.pipeline.healing_job import new_job

PNG = b"\x89PNG\r\n\x1a\n"
NULLABLE = ("command", "parent", "parameters", "perplexity", "positions", "healing", "gate")


@pytest.fixture(scope="session")
def healed_run(tiny_run: Path) -> Path:
    """Return the tiny run healed for two epochs, beside it; tests leave it as it is."""
    folder = tiny_run.with_name("tiny-healed")
    finetune_run(new_job(tiny_run, {"heal.learning_rate": 1e-3, "heal.patience": 2}, output=folder))
    return folder


@pytest.fixture
def changed(tiny_run: Path, tmp_path: Path) -> Callable[..., Path]:
    """Return what copies a run and replaces figures of its results, or removes them."""

    def copy(**perplexity: Any) -> Path:
        folder = shutil.copytree(tiny_run, tmp_path / "changed")
        results = json.loads((folder / "results.json").read_text())
        results["perplexity"] |= perplexity
        (folder / "results.json").write_text(json.dumps(results))
        return folder

    return copy


def test_the_document_holds_what_the_runs_say(
    vdcompress: Vdcompress, tiny_run: Path, healed_run: Path
) -> None:
    ended = vdcompress("compare", tiny_run, healed_run, "--json")

    assert ended.code == 0, ended.err
    found = ended.json
    assert found["schema"] == 1
    assert found["command"] == "compare"
    assert found["warnings"] == []
    assert found["plot"] is None
    before, after = found["runs"]
    assert (before["name"], after["name"]) == ("tiny", "tiny-healed")
    for entry, folder in ((before, tiny_run), (after, healed_run)):
        saved = json.loads((folder / "results.json").read_text())
        for key in ("parameters", "kv_cache", "perplexity", "positions"):
            assert entry[key] == saved[key]
        assert entry["run"] == str(folder)
        assert entry["seconds"] == pytest.approx(sum(saved["seconds"].values()), abs=0.01)
    assert before["healing"] is None
    healing = json.loads((healed_run / "results.json").read_text())["healing"]
    assert after["healing"]["best_epoch"] == healing["best_epoch"]
    assert after["healing"]["tokens"] == healing["tokens"] == 2 * 16 * 31
    validated = [epoch["val_ppl"] for epoch in healing["epochs"]]
    assert after["healing"]["validation"] == [healing["initial_val_ppl"], *validated]


def test_the_tables_show_each_run(vdcompress: Vdcompress, tiny_run: Path, healed_run: Path) -> None:
    ended = vdcompress("compare", tiny_run, healed_run)

    assert ended.code == 0, ended.err
    perplexity = json.loads((healed_run / "results.json").read_text())["perplexity"]
    for name in ("base", "compressed", "healed"):
        assert f"{perplexity[name]:.2f}" in ended.out
    for words in ("384", "-25.0%", "perplexity by position", "96-128", "992", "of 2"):
        assert words in ended.out


def test_runs_of_every_kind_are_drawn(
    vdcompress: Vdcompress, tiny_run: Path, healed_run: Path, tmp_path: Path
) -> None:
    exported = vdcompress("export", healed_run, "-o", "out/model")
    assert exported.code == 0, exported.err

    ended = vdcompress("compare", tiny_run, healed_run, "out/model", "-o", "side.png", "--json")

    assert ended.code == 0, ended.err
    assert Path("side.png").read_bytes().startswith(PNG)
    assert ended.json["plot"] == "side.png"
    assert [entry["command"] for entry in ended.json["runs"]] == ["apply", "finetune", "export"]
    refused = vdcompress("compare", tiny_run, "-o", "side.png")
    assert (refused.code, refused.out) == (2, "")
    assert "--force" in refused.err
    assert vdcompress("compare", tiny_run, "-o", "side.pdf").code == 2


def test_a_folder_without_results_has_its_cache_alone(
    vdcompress: Vdcompress, tiny_run: Path, tmp_path: Path
) -> None:
    bare = shutil.copytree(tiny_run, tmp_path / "bare")
    (bare / "results.json").unlink()

    ended = vdcompress("compare", bare, tiny_run, "--json")

    assert ended.code == 0, ended.err
    entry, whole = ended.json["runs"]
    assert all(entry[key] is None for key in NULLABLE)
    assert entry["kv_cache"]["bytes_per_token"] == whole["kv_cache"]["bytes_per_token"] == 384
    assert vdcompress("compare", bare).code == 0
    refused = vdcompress("compare", bare, "-o", "bare.png")
    assert refused.code == 2
    assert "nothing to draw" in refused.err
    assert not Path("bare.png").exists()


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ({"perplexity": {"base": "seven"}}, "perplexity.base"),
        ({"perplexity": {"compressed": -3.0}}, "perplexity.compressed"),
        ({"perplexity": {"healed": math.nan}}, "perplexity.healed"),
        ({"kv_cache": {"bytes_per_token": 0}}, "kv_cache"),
        ({"parameters": {"compressed": True}}, "parameters.compressed"),
        ({"positions": [{"from": 0, "base": 2.0}]}, "positions.0.to"),
        ({"seconds": {"load": "long"}}, "seconds.load"),
        ({"healing": {}}, "healing.best_epoch"),
    ],
)
def test_figures_that_cannot_be_are_refused(
    vdcompress: Vdcompress, tiny_run: Path, tmp_path: Path, damage: dict[str, Any], says: str
) -> None:
    folder = shutil.copytree(tiny_run, tmp_path / "damaged")
    results = json.loads((folder / "results.json").read_text())
    (folder / "results.json").write_text(json.dumps(results | damage))
    assert_refused(vdcompress("compare", folder), 3, f"results.json is damaged: {says}")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        ({"best_epoch": 99}, "best_epoch is 99 of"),
        ({"epochs": []}, "healing.epochs"),
        ({"epochs": [{"val_ppl": "x"}]}, "healing.epochs.0.val_ppl"),
        ({"tokens": "many"}, "healing.tokens"),
    ],
)
def test_courses_that_cannot_be_are_refused(
    vdcompress: Vdcompress, healed_run: Path, tmp_path: Path, damage: dict[str, Any], says: str
) -> None:
    folder = shutil.copytree(healed_run, tmp_path / "damaged")
    results = json.loads((folder / "results.json").read_text())
    results["healing"] |= damage
    (folder / "results.json").write_text(json.dumps(results))
    assert_refused(vdcompress("compare", folder), 3, "results.json is damaged", says)


def test_what_is_no_run_is_refused(vdcompress: Vdcompress, tiny_run: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    damaged = shutil.copytree(tiny_run, tmp_path / "damaged")
    partial = tmp_path / "half.partial"
    partial.mkdir()

    assert_refused(vdcompress("compare", tiny_run, "empty"), 3, "empty is not a finished run")
    assert_refused(vdcompress("compare", tiny_run, "nowhere"), 3, "nowhere does not exist")
    for text in ("{", "null", "{}", "[]"):
        (damaged / "results.json").write_text(text)
        assert_refused(vdcompress("compare", tiny_run, damaged), 3, "no readable results.json")
        assert_refused(vdcompress("export", damaged), 3, "no readable results.json")
    assert_refused(vdcompress("compare", tiny_run, partial), 3, "was interrupted", "--resume")
    assert_refused(vdcompress("compare"), 3, "no finished run")


def test_without_names_it_is_all_runs_the_earliest_first(
    vdcompress: Vdcompress, tiny_run: Path, healed_run: Path
) -> None:
    for name, source in (("b", tiny_run), ("a", healed_run)):
        shutil.copytree(source, Path("runs") / name)

    found = vdcompress("compare", "--json").json["runs"]

    assert [entry["run"] for entry in found] == ["runs/b", "runs/a"]
    twice = vdcompress("compare", "a", "runs/a", "b", "--json").json["runs"]
    assert [entry["run"] for entry in twice] == ["runs/a", "runs/b"]


@pytest.mark.parametrize(
    ("perplexity", "says"),
    [
        ({"data": "other.txt"}, "text: "),
        ({"window": 64}, "tokens in a window: 128, 64"),
        ({"tokens": 1280}, "tokens: 256, 1,280"),
        ({"base": 9.0}, "the base's own perplexity differs"),
    ],
)
def test_figures_that_cannot_be_compared_are_told(
    vdcompress: Vdcompress,
    tiny_run: Path,
    changed: Callable[..., Path],
    perplexity: dict[str, Any],
    says: str,
) -> None:
    ended = vdcompress("compare", tiny_run, changed(**perplexity), "--json")

    assert ended.code == 0
    [warning] = ended.json["warnings"]
    assert says in warning
    assert f"warning: {warning}" in ended.err


def test_runs_of_different_models_are_told(
    vdcompress: Vdcompress, tiny_run: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(tiny_run, tmp_path / "other")
    marker = json.loads((other / "vdcompress.json").read_text())
    marker["base"]["id"] = "someone/else"
    (other / "vdcompress.json").write_text(json.dumps(marker))

    [warning] = vdcompress("compare", tiny_run, other, "--json").json["warnings"]

    assert "different models" in warning


def test_names_are_short_where_they_can_be() -> None:
    stamp, later = "-20260131-142210", "-20260201-000000-2"
    folders = [
        Path(f"runs/m-v320{stamp}"),
        Path(f"runs/m-v320{stamp}-healed{stamp}"),
        Path(f"runs/m-v320{stamp}-healed{later}"),
        Path("runs/mine"),
        Path("exports/mine"),
    ]

    assert list(labels(folders).values()) == [
        "m-v320",
        f"m-v320-healed{stamp}",
        f"m-v320-healed{later}",
        "runs/mine",
        "exports/mine",
    ]


def test_positions_of_different_buckets_share_a_table(
    tiny_run: Path, changed: Callable[..., Path]
) -> None:
    other = changed()
    results = json.loads((other / "results.json").read_text())
    results["positions"] = [{"from": 0, "to": 128, "base": 8.0, "compressed": 10.0}]
    (other / "results.json").write_text(json.dumps(results))

    found = compare_runs([tiny_run, other])

    table = comparison_report.comparison_tables(found)[2]
    assert table.header[1:3] == ("0-16", "0-128")
    assert [row[2] for row in table.rows] == ["-", "10.00"]
    assert plots_comparison.comparison(found).startswith(PNG)
