"""Run folders are named so that they can be found again."""

from __future__ import annotations

import json
import os
import re
import shlex
from pathlib import Path

import pytest

from vdcompress import runs
from vdcompress.errors import RunError


def finish(run: Path, when: float) -> Path:
    run.mkdir(parents=True)
    marker = run / runs.MARKER
    marker.write_text("{}")
    os.utime(marker, (when, when))
    return run


@pytest.mark.parametrize(
    ("model", "stem"),
    [
        ("pythia-70m", "pythia-70m"),
        ("EleutherAI/pythia-70m", "pythia-70m"),
        ("./weights/my model/", "my-model"),
        ("..", "model"),
    ],
)
def test_names_say_model_label_and_time(tmp_path: Path, model: str, stem: str) -> None:
    if model == "..":
        model = "/"
    name = runs.new_run(model, "v320", tmp_path).name
    assert re.fullmatch(rf"{stem}-v320-\d{{8}}-\d{{6}}", name)


def test_what_becomes_a_run_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    assert runs.partial_of(Path("r")) == Path("r.partial")
    assert runs.partial_of(Path()) == tmp_path.resolve() / "here.partial"
    with pytest.raises(RunError, match="cannot be the folder of a run"):
        runs.partial_of(Path("/"))


def test_two_runs_in_one_second_differ(tmp_path: Path) -> None:
    first = finish(runs.new_run("m", "v8", tmp_path), 1)
    assert runs.new_run("m", "v8", tmp_path) != first


def test_healing_twice_does_not_pile_up_suffixes(tmp_path: Path) -> None:
    once = runs.new_healed(tmp_path / "m-v8-20260101-000000", tmp_path)
    twice = runs.new_healed(once, tmp_path / "other")
    assert twice.name == once.name


def test_the_latest_is_the_one_that_finished_last(tmp_path: Path) -> None:
    finish(tmp_path / "a", 200)
    finish(tmp_path / "b", 100)
    finish(tmp_path / ".hidden", 300)
    finish(tmp_path / "c.partial", 400)
    (tmp_path / "unfinished").mkdir()
    assert runs.latest(tmp_path) == tmp_path / "a"


def test_a_run_is_found_by_name_and_by_folder(tmp_path: Path) -> None:
    run = finish(tmp_path / "a", 1)
    assert runs.resolve("a", tmp_path) == run
    assert runs.resolve(run, tmp_path) == run
    assert runs.resolve(None, tmp_path) == run


def test_what_is_not_a_run_is_said(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no finished run under"):
        runs.latest(tmp_path)
    finish(tmp_path / "model-v320", 1)
    with pytest.raises(RunError, match="does not exist") as caught:
        runs.resolve("model-v32", tmp_path)
    assert "did you mean 'model-v320'" in caught.value.hint
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match="is not a finished run"):
        runs.resolve("empty", tmp_path)


def test_an_interrupted_run_says_how_to_continue(tmp_path: Path) -> None:
    partial = tmp_path / "m-healed-20260101-000000.partial"
    partial.mkdir()
    for name in (partial, runs.finished_of(partial)):
        with pytest.raises(RunError, match="was interrupted") as caught:
            runs.resolve(name, tmp_path)
        assert f"--resume {partial}" in caught.value.hint


def test_commands_can_be_pasted_into_a_shell(tmp_path: Path) -> None:
    partial = tmp_path / "my run.partial"
    assert shlex.split(runs.resuming(partial)) == [
        "vdcompress",
        "finetune",
        "--resume",
        str(partial),
    ]
    assert runs.command("export", "runs/plain") == "vdcompress export runs/plain"


def test_an_interrupted_finetune_is_found_by_what_it_heals(tmp_path: Path) -> None:
    partial = tmp_path / "m-v8-20260101-000000-healed-20260101-000001.partial"
    partial.mkdir()
    for name in (None, partial, partial.name, runs.finished_of(partial), "m-v8-20260101-000000"):
        assert runs.resolve_partial(name, tmp_path) == partial
    with pytest.raises(RunError, match="no interrupted finetune of other"):
        runs.resolve_partial("other", tmp_path)


def test_an_interrupted_finetune_of_any_name_is_found_by_what_it_heals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, elsewhere, root = tmp_path / "here", tmp_path / "elsewhere", tmp_path / "runs"
    run, partial = elsewhere / "mine", here / "out.partial"
    for folder in (run, partial, here / "broken.partial", root):
        folder.mkdir(parents=True)
    (partial / runs.HEALS).write_text(json.dumps({"run": str(run)}))
    (here / "broken.partial" / runs.HEALS).write_text("{")
    monkeypatch.chdir(here)
    assert runs.resolve_partial(run, root) == Path("out.partial")
    with pytest.raises(RunError, match="no interrupted finetune of"):
        runs.resolve_partial(elsewhere, root)
