"""``apply`` layer by layer: what it writes and measures is what ``apply`` does; all or nothing."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import Vdcompress, tiny_settings
from vdcompress import artifact, runs
from vdcompress.artifact import load_artifact
from vdcompress.cli import values
from vdcompress.errors import ArtifactError, ModelError, RunError
from vdcompress.events import Event, Progress, StageStarted, Warned
from vdcompress.load import load_config
from vdcompress.pipeline import streaming
from vdcompress.pipeline.apply import apply_recipe
from vdcompress.pipeline.streaming import apply_streaming
from vdcompress.recipe import Recipe

SPILLS, LARGE = 10_000, 10**9
MEASURED = ("results.json", "README.md")


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (artifact, streaming):
        monkeypatch.setattr(module, "MAX_SHARD_SIZE", "60KB")


@pytest.fixture(params=["tiny_neox", "tiny_llama"])
def recipe(request: Any, text_file: Path) -> Recipe:
    folder = request.getfixturevalue(request.param)
    narrow = {"plan.v_dim": 16 if "llama" in request.param else 32}
    return Recipe().merged(tiny_settings(folder, text_file) | narrow)


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("max_memory", [SPILLS, LARGE], ids=["file", "memory"])
def test_it_writes_and_measures_what_apply_does(
    recipe: Recipe, tmp_path: Path, max_memory: int
) -> None:
    whole = apply_recipe(recipe, output=tmp_path / "whole")
    streamed = apply_streaming(recipe, max_memory=max_memory, output=tmp_path / "streamed")
    names = sorted(path.name for path in (tmp_path / "whole").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "streamed").iterdir())
    assert len([name for name in names if name.endswith(".safetensors")]) > 2
    for name in names:
        if name not in MEASURED:
            ours, theirs = (tmp_path / run / name for run in ("streamed", "whole"))
            assert ours.read_bytes() == theirs.read_bytes(), name
    same_results(streamed, whole)
    assert json.loads((tmp_path / "streamed" / "results.json").read_text())["perplexity"]
    load_artifact(tmp_path / "streamed")


def same_results(streamed: dict[str, Any], whole: dict[str, Any]) -> None:
    assert streamed.keys() == whole.keys()
    for name in ("schema", "command", "model", "plan", "parameters", "cost"):
        assert streamed[name] == whole[name]
    assert streamed["kv_cache"] == whole["kv_cache"] | {"measured": None}
    for name, value in whole["perplexity"].items():
        expected = pytest.approx(value, rel=1e-5, abs=1e-6) if isinstance(value, float) else value
        assert streamed["perplexity"][name] == expected
    for ours, theirs in zip(streamed["positions"], whole["positions"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.parametrize(
    "asked",
    [
        {"plan.k_dim": 16},
        {"plan.k_dim": 16, "plan.groups": 1},
        {"plan.k_dim": None, "plan.groups": 1},
        {"plan.k_dim": 16, "start.refit": "none"},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["tiny_neox", "tiny_llama"])
def test_keys_and_shared_latents_are_those_of_apply(
    request: Any, text_file: Path, tmp_path: Path, kind: str, asked: dict[str, Any]
) -> None:
    settings = tiny_settings(request.getfixturevalue(kind), text_file) | {"plan.v_dim": 16}
    start = {"start.initializer": "optimal", "start.alternate": 0}
    if kind == "tiny_neox" and "plan.groups" in asked and asked["plan.k_dim"]:
        asked = asked | {"plan.k_dim": 32, "plan.k_rotary_dim": 16}  # or it would need gains
    recipe = Recipe().merged(settings | start | asked)
    apply_recipe(recipe, output=tmp_path / "whole")
    apply_streaming(recipe, max_memory=LARGE, output=tmp_path / "streamed")
    for name in ("model.safetensors", "config.json", "vdcompress.json"):
        ours, theirs = (tmp_path / run / name for run in ("streamed", "whole"))
        assert ours.read_bytes() == theirs.read_bytes(), name


def test_another_dtype(tiny_neox: Path, text_file: Path, tmp_path: Path) -> None:
    settings = tiny_settings(tiny_neox, text_file) | {"dtype": "float16"}
    recipe = Recipe().merged(settings)
    apply_recipe(recipe, output=tmp_path / "whole")
    apply_streaming(recipe, max_memory=LARGE, output=tmp_path / "streamed")
    for name in ("model.safetensors", "config.json", "vdcompress.json"):
        assert (tmp_path / "streamed" / name).read_bytes() == (
            tmp_path / "whole" / name
        ).read_bytes()


def test_the_quality_gate(recipe: Recipe, tmp_path: Path) -> None:
    strict = recipe.merged({"gate.max_ratio": 0.001})
    results = apply_streaming(strict, max_memory=LARGE, output=tmp_path / "run")
    assert results["gate"]["passed"] is False
    assert runs.is_finished(tmp_path / "run")


def test_progress_and_warnings(recipe: Recipe, tmp_path: Path) -> None:
    heard: list[Event] = []
    apply_streaming(recipe, max_memory=SPILLS, output=tmp_path / "run", on_event=heard.append)
    stages = [event.stage for event in heard if isinstance(event, StageStarted)]
    assert stages == ["load", "read text", "compress", "evaluate", "write"]
    done = [(event.stage, event.done) for event in heard if isinstance(event, Progress)]
    assert done == [("compress", n) for n in (1, 2)] + [("evaluate", n) for n in (1, 2, 3, 4)]
    assert any("one layer" in event.message for event in heard if isinstance(event, Warned))


def test_max_memory_decides_which_way(
    vdcompress: Vdcompress, recipe: Recipe, tiny_llama: Path, text_file: Path
) -> None:
    config = load_config(str(recipe.model))
    model = config.family.base_on_meta(config.config)
    size = 4 * sum(parameter.numel() for parameter in model.parameters())
    common = ("--v-dim", 32 - 16 * (config.shape.kv_heads == 2), "--data", text_file)
    common = ("apply", recipe.model, *common, "--samples", 8, "--seq-len", 64, "--windows", 1)
    whole = vdcompress(*common, "--max-memory", f"{size / 1000}kB", "--json").json
    streamed = vdcompress(*common, "--max-memory", f"{size - 1}", "--json").json
    assert "calibrate" in whole["seconds"]
    assert "compress" not in whole["seconds"]
    assert "compress" in streamed["seconds"]
    same_results(streamed, whole)


@pytest.mark.parametrize("text", ["GB", "0", "-3GB", "2 XB", "two", "1e3"])
def test_sizes_that_are_none(vdcompress: Vdcompress, tiny_neox: Path, text: str) -> None:
    ended = vdcompress("apply", tiny_neox, "--v-dim", 32, f"--max-memory={text}")
    assert ended.code == 2
    assert "is not a size" in ended.err


@pytest.mark.parametrize(
    ("text", "expected"),
    [("2GB", 2 * 10**9), ("1.5 MiB", 3 * 2**19), ("7", 7), ("3k", 3000), ("1TB", 10**12)],
)
def test_sizes(text: str, expected: int) -> None:
    assert values.size(text) == expected
    assert values.size(None) is None


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--kv-budget", "0.5"], "needs the gains of the whole model"),
        (["--v-dim", "32", "--allocation", "layers"], "needs the gains of the whole model"),
        (["--v-dim", "32", "--initializer", "fisher"], "needs gradients through the whole model"),
    ],
)
def test_what_takes_the_whole_model_is_refused(
    vdcompress: Vdcompress, tiny_neox: Path, flags: list[str], says: str
) -> None:
    ended = vdcompress("apply", tiny_neox, *flags, "--max-memory", "1kB")
    assert ended.code == 2
    assert says in ended.err
    assert not Path("runs").exists()


def test_the_alternation_of_keys_is_left_out_aloud(
    vdcompress: Vdcompress, tiny_llama: Path, text_file: Path
) -> None:
    common = ("apply", tiny_llama, "--k-dim", 16, "--data", text_file, "--samples", 8)
    common = (*common, "--seq-len", 64, "--windows", 1, "--max-memory", "1kB")
    ended = vdcompress(*common)
    assert ended.code == 0, ended.err
    assert "leaves out the alternation of keys" in ended.err
    assert "leaves out" not in vdcompress(*common, "--alternate", 0).err


STOPS = [
    (OSError(errno.ENOSPC, "No space left on device"), ArtifactError),
    (KeyboardInterrupt(), KeyboardInterrupt),
    (ZeroDivisionError(), ZeroDivisionError),
]


@pytest.mark.parametrize(("error", "seen"), STOPS, ids=["full", "stopped", "broken"])
@pytest.mark.parametrize("after", [0, 5, 20])
def test_interrupted_writes_leave_nothing(
    recipe: Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    seen: type[BaseException],
    after: int,
) -> None:
    from vdcompress.shards import ShardWriter

    write, written = ShardWriter.write, []

    def failing(self: ShardWriter, *args: Any) -> None:
        written.append(args[0])
        if len(written) > after:
            raise error
        write(self, *args)

    monkeypatch.setattr(ShardWriter, "write", failing)
    with pytest.raises(seen) as caught:
        apply_streaming(recipe, max_memory=SPILLS, output=tmp_path / "deep" / "run")
    assert len(written) == after + 1
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    assert not (tmp_path / "deep" / "run").exists()
    if seen is ArtifactError:
        assert "could not be written" in caught.value.message


@pytest.mark.parametrize("step", ["evaluate_stacks", "write_config", "write_companions"])
def test_late_failures_leave_nothing(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    def stop(*args: Any, **kwargs: Any) -> None:
        assert list(tmp_path.rglob("*.safetensors"))
        raise KeyboardInterrupt

    monkeypatch.setattr(streaming, step, stop)
    with pytest.raises(KeyboardInterrupt):
        apply_streaming(recipe, max_memory=LARGE, output=tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_an_older_run_is_replaced_only_by_force(
    recipe: Recipe, tmp_path: Path, tiny_run: Path
) -> None:
    shutil.copytree(tiny_run, tmp_path / "run")
    with pytest.raises(RunError, match="holds an artefact already"):
        apply_streaming(recipe, max_memory=LARGE, output=tmp_path / "run")
    results = apply_streaming(recipe, max_memory=LARGE, output=tmp_path / "run", force=True)
    found = json.loads((tmp_path / "run" / "results.json").read_text())
    assert found["model"] == results["model"]
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.fixture
def damaged(recipe: Recipe, tmp_path: Path) -> Callable[[int], Recipe]:
    def truncate(left: int) -> Recipe:
        folder = tmp_path / "model"
        shutil.copytree(str(recipe.model), folder)
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:left])
        return recipe.merged({"model": str(folder)})

    return truncate


@pytest.mark.parametrize("left", [5, 3000, -1000])
def test_a_truncated_shard_is_one_clear_line(
    damaged: Callable[[int], Recipe], tmp_path: Path, left: int
) -> None:
    broken = damaged(left)
    with pytest.raises(ModelError, match="cannot be read") as caught:
        apply_streaming(broken, max_memory=LARGE, output=tmp_path / "out" / "run")
    assert caught.value.exit_code == 3
    assert "\n" not in caught.value.message
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == []
