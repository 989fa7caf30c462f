"""``sweep``: many plans after one calibration, resumable, with a table and a plot."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import Ended, Vdcompress
from synthetic import model_gains
from vdcompress import plots
from vdcompress.errors import PlanError, UsageError
from vdcompress.events import Event, RowEnded
from vdcompress.frontier import frontier
from vdcompress.pipeline import sweep as pipeline
from vdcompress.pipeline import sweep_rows
from vdcompress.pipeline.sweep_folder import RowError, SweepFolder
from vdcompress.pipeline.sweep_plans import label, variants
from vdcompress.recipe import Recipe
from vdcompress.sweep_report import sweep_table, unmeasured_table

PNG = b"\x89PNG\r\n\x1a\n"
SMALL = ("--samples", "8", "--seq-len", "64", "--windows", "2")
LISTS = ("--v-dim", "48,32", "--initializer", "pca,svd")
ROWS = ("v48-pca", "v48-svd", "v32-pca", "v32-svd")
BUDGETS = ((0.75, "pca"), (0.75, "svd"), (0.5, "pca"), (0.5, "svd"))
Swept = Callable[..., Ended]


@pytest.fixture
def swept(vdcompress: Vdcompress, tiny_neox: Path, text_file: Path) -> Swept:
    """Sweep the tiny GPT-NeoX into the folder ``s``."""

    def call(*arguments: str, lists: tuple[str, ...] = LISTS) -> Ended:
        common = (*SMALL, "--data", text_file, "-o", "s")
        return vdcompress("sweep", tiny_neox, *lists, *common, *arguments)

    return call


@pytest.fixture(scope="session")
def finished_sweep(
    tmp_path_factory: pytest.TempPathFactory, tiny_neox: Path, text_file: Path
) -> Path:
    """Return the folder of what ``swept`` does without arguments; tests leave it as it is."""
    from vdcompress.cli.app import run

    folder = tmp_path_factory.mktemp("sweeps") / "s"
    code = run(
        ["sweep", str(tiny_neox), *LISTS, *SMALL, "--data", str(text_file), "-o", str(folder), "-q"]
    )
    assert code == 0
    return folder


@pytest.fixture
def finished(finished_sweep: Path, swept: Swept) -> dict[str, Any]:
    """Copy a finished sweep to ``s`` and return its document."""
    shutil.copytree(finished_sweep, "s")
    found: dict[str, Any] = json.loads(Path("s/sweep.json").read_text())
    return found


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the names of the rows that are measured from now on."""
    names: list[str] = []
    real = pipeline.measured

    def measure(row: Any, work: Any, listener: Any) -> Any:
        names.append(row.name)
        return real(row, work, listener)

    monkeypatch.setattr(pipeline, "measured", measure)
    return names


def row_files() -> list[str]:
    return sorted(path.name for path in Path("s/rows").iterdir())


def figures(found: dict[str, Any]) -> dict[str, Any]:
    """Return what must not depend on how often a sweep was interrupted."""
    rows = [*found["references"], *found["rows"]]
    names = ("row", "state", "plan", "kv_cache", "perplexity", "positions", "settings")
    kept = {row["row"]: {name: row[name] for name in names} for row in rows}
    return kept | {name: found[name] for name in ("base", "frontier", "plan_frontier")}


def test_every_combination_is_a_row(swept: Swept, measured: list[str]) -> None:
    ended = swept()
    assert ended.code == 0, ended.err
    assert measured == ["int8", "int4", *ROWS]
    assert row_files() == sorted(f"{name}.json" for name in measured)
    for name in ("fp16", *measured):
        assert name in ended.out
    assert ended.err.count("calibrate ") == 1
    assert "v32-svd: 384 bytes per token, ppl " in ended.err
    found = json.loads(Path("s/sweep.json").read_text())
    assert Path("s/sweep.png").read_bytes().startswith(PNG)
    assert [row["row"] for row in found["rows"]] == list(ROWS)
    assert not [path for path in Path("s").rglob("*") if "partial" in path.name]


def test_the_document_is_printed_once(swept: Swept) -> None:
    ended = swept("--json")
    assert ended.code == 0, ended.err
    found = ended.json
    assert found == json.loads(Path("s/sweep.json").read_text())
    assert (found["schema"], found["command"], found["run"]) == (1, "sweep", "s")
    assert found["base"]["bytes_per_token"] == 512
    assert [row["kv_cache"]["bytes_per_token"] for row in found["references"]] == [320, 192]
    assert {row["state"] for row in found["rows"]} == {"done"}
    assert {"load", "read text", "calibrate", "sweep"} <= set(found["seconds"])


def test_a_row_is_what_apply_finds(
    finished: dict[str, Any], vdcompress: Vdcompress, tiny_neox: Path, text_file: Path
) -> None:
    rows = {row["row"]: row for row in finished["rows"]}
    applied = vdcompress(
        *("apply", tiny_neox, "--v-dim", "32", "--initializer", "pca", *SMALL),
        *("--data", text_file, "-o", "run", "--json"),
    ).json
    for name in ("plan", "parameters", "kv_cache", "perplexity", "positions"):
        assert rows["v32-pca"][name] == applied[name], name


def test_initialisers_with_other_moments_share_the_calibration(
    swept: Swept, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    real = pipeline.calibrate
    monkeypatch.setattr(pipeline, "calibrate", lambda *a, **k: calls.append(a) or real(*a, **k))
    ended = swept(lists=("--v-dim", "32", "--initializer", "random,svd,pca,optimal"))
    assert ended.code == 0, ended.err
    assert len(calls) == 1
    assert "not measured" not in ended.out


def test_gains_are_measured_once_for_plans_that_read_the_same(
    swept: Swept, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []

    def gains(shape: Any, _statistics: Any, groups: Any) -> Any:
        calls.append(groups)
        return model_gains(shape)

    monkeypatch.setattr("vdcompress.gains.gains", gains)
    monkeypatch.setattr(sweep_rows, "compressed_model", lambda base, *_: base.model)
    lists = ("--kv-budget", "0.75,0.5", "--v-dim", "32", "--initializer", "pca,svd")
    ended = swept("--json", lists=lists)
    assert ended.code == 0, ended.err
    assert calls == [(1, 2, 4)]
    rows = {row["row"]: row for row in ended.json["rows"]}
    assert list(rows) == ["v32-pca", "v32-svd", *(f"kv{b}-{i}" for b, i in BUDGETS)]
    assert rows["v32-pca"]["predicted_loss"] is None
    less, more = (rows[f"kv{share}-pca"] for share in (0.5, 0.75))
    assert less["kv_cache"]["bytes_per_token"] <= 256 < more["kv_cache"]["bytes_per_token"] <= 384
    assert less["predicted_loss"]["total"] > more["predicted_loss"]["total"] > 0


def test_the_same_command_repeats_nothing(
    swept: Swept, finished: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("s/sweep.png").unlink()

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("nothing is left to do")

    monkeypatch.setattr(pipeline, "load", fail)
    again = swept("--json")
    assert again.code == 0, again.err
    assert figures(again.json) == figures(finished)
    assert Path("s/sweep.png").exists()


@pytest.mark.usefixtures("finished")
def test_more_values_only_add_rows(swept: Swept, measured: list[str]) -> None:
    ended = swept("--json", lists=("--v-dim", "32,16", "--initializer", "pca"))
    assert ended.code == 0, ended.err
    assert measured == ["v16-pca"]
    assert {row["row"] for row in ended.json["rows"]} == {*ROWS, "v16-pca"}


def test_without_a_folder_the_settings_find_it_again(
    vdcompress: Vdcompress, tiny_neox: Path, text_file: Path, measured: list[str]
) -> None:
    arguments = ("sweep", tiny_neox, "--v-dim", "32", *SMALL, "--data", text_file, "--json")
    first = vdcompress(*arguments).json
    assert len(measured) == 3
    assert vdcompress(*arguments).json["run"] == first["run"]
    assert len(measured) == 3
    other = vdcompress(*arguments, "--windows", "1").json
    assert other["run"] != first["run"]
    assert {Path(first["run"]), Path(other["run"])} == set(Path("sweeps").iterdir())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--windows", "1"), "another evaluation.windows (2, not 1)"),
        (("--samples", "9"), "another calibration.samples (8, not 9)"),
        (("--seed", "3"), "another calibration.seed (0, not 3)"),
        (("--eval-data", "stdlib"), "another evaluation.data (None, not stdlib)"),
        (("--dtype", "float32"), "another dtype (bfloat16, not float32)"),
        (("--text-field", "body"), "another text_field (text, not body)"),
    ],
)
@pytest.mark.usefixtures("finished")
def test_other_settings_are_refused(swept: Swept, arguments: tuple[str, ...], says: str) -> None:
    before = Path("s/sweep.json").read_bytes()
    ended = swept(*arguments)
    assert ended.code == 3
    error, hint = ended.err.splitlines()
    assert error == f"error: s holds a sweep with {says}"
    assert hint == "hint: name another folder with -o"
    assert Path("s/sweep.json").read_bytes() == before


@pytest.mark.usefixtures("finished")
def test_another_model_is_refused(
    vdcompress: Vdcompress, tiny_llama: Path, text_file: Path
) -> None:
    ended = vdcompress(
        *("sweep", tiny_llama, "--v-dim", "16", *SMALL, "--data", text_file, "-o", "s")
    )
    assert ended.code == 3
    assert "error: s holds a sweep with another model.id (" in ended.err


def test_other_weights_under_the_same_name_are_refused(
    vdcompress: Vdcompress, tiny_neox: Path, text_file: Path
) -> None:
    shutil.copytree(tiny_neox, "model")
    arguments = ("sweep", "model", "--v-dim", "32", *SMALL, "--data", text_file, "-o", "s")
    assert vdcompress(*arguments).code == 0
    weights = bytearray(Path("model/model.safetensors").read_bytes())
    weights[-2] ^= 1
    Path("model/model.safetensors").write_bytes(weights)
    ended = vdcompress(*arguments)
    assert ended.code == 3
    assert "another model.weights" in ended.err


def test_text_that_changed_is_refused(
    vdcompress: Vdcompress, tiny_neox: Path, text_file: Path
) -> None:
    Path("t.txt").write_text(text_file.read_text())
    arguments = ("sweep", tiny_neox, *SMALL, "--data", "t.txt", "-o", "s")
    assert vdcompress(*arguments, "--v-dim", "32").code == 0
    Path("t.txt").write_text(text_file.read_text()[5000:])
    ended = vdcompress(*arguments, "--v-dim", "16")
    assert ended.code == 3
    assert "over other text" in ended.err
    assert not Path("s/rows/v16.json").exists()


def test_the_impossible_is_told_and_skipped(swept: Swept, measured: list[str]) -> None:
    ended = swept(lists=("--v-dim", "1000,32,30", "--initializer", "pca"))
    assert ended.code == 0, ended.err
    assert measured == ["int8", "int4", "v32-pca"]
    assert "v_dim 1000 is above the model's 64" in ended.out
    row = json.loads(Path("s/rows/v30-pca.json").read_text())
    assert (row["state"], row["perplexity"]) == ("impossible", None)
    assert "not divisible by 4" in row["reason"]


def test_nothing_possible_is_a_usage_error(swept: Swept) -> None:
    ended = swept(lists=("--v-dim", "1000,2000"))
    assert ended.code == 2
    assert ended.err.startswith("error: no combination can be planned: v1000: ")
    assert len(ended.err.splitlines()) == 2
    assert not Path("s").exists()


def break_rows(monkeypatch: pytest.MonkeyPatch, error: BaseException, *names: str) -> None:
    """Let the rows of these initialisers end with an error."""
    real = sweep_rows.compressed_model

    def compressed_model(base: Any, plan: Any, *rest: Any) -> Any:
        if plan.start.initializer in names:
            raise error
        return real(base, plan, *rest)

    monkeypatch.setattr(sweep_rows, "compressed_model", compressed_model)


def test_a_failed_row_is_kept_with_its_reason_and_tried_again(
    swept: Swept, monkeypatch: pytest.MonkeyPatch, measured: list[str]
) -> None:
    with monkeypatch.context() as broken:
        break_rows(broken, RuntimeError("it did not converge\nfor long"), "svd")
        ended = swept()
    assert ended.code == 0, ended.err
    assert "v48-svd: not measured: RuntimeError: it did not converge" in ended.err
    assert "RuntimeError: it did not converge" in ended.out
    row = json.loads(Path("s/rows/v48-svd.json").read_text())
    assert (row["state"], row["plan"]) == ("failed", None)
    assert measured == ["int8", "int4", *ROWS]
    del measured[:]
    again = swept()
    assert measured == ["v48-svd", "v32-svd"]
    assert "not measured" not in again.out


def test_a_sweep_without_one_plan_ends_badly(swept: Swept, monkeypatch: pytest.MonkeyPatch) -> None:
    break_rows(monkeypatch, RuntimeError("no luck"), "pca", "svd")
    ended = swept("--json")
    assert ended.code == 3
    assert "error: no plan could be measured: v48-pca: RuntimeError: no luck" in (ended.err)
    assert {row["state"] for row in ended.json["rows"]} == {"failed"}


def test_what_only_calibration_tells_is_impossible_too(
    swept: Swept, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_rows(monkeypatch, PlanError([f"reason {n}" for n in range(5)]), "pca", "svd")
    ended = swept("--json")
    assert ended.code == 2
    assert "error: no combination could be planned: v48-pca: reason 0; reason 1; and 3 more" in (
        ended.err
    )
    assert {row["state"] for row in ended.json["rows"]} == {"impossible"}


@pytest.mark.parametrize("count", [0, 3])
def test_an_interrupted_sweep_continues(
    swept: Swept,
    finished: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    measured: list[str],
    count: int,
) -> None:
    Path("s").rename("whole")
    real = sweep_rows.measured
    with monkeypatch.context() as interrupted:

        def measure(row: Any, work: Any, listener: Any) -> Any:
            if len(measured) == count:
                raise KeyboardInterrupt
            measured.append(row.name)
            return real(row, work, listener)

        interrupted.setattr(pipeline, "measured", measure)
        ended = swept()
    assert ended.code == 130
    kept = "nothing was written"
    if count:
        kept = f"{count} finished row{'s' if count > 1 else ''} kept in s"
        assert ended.err.splitlines()[-1] == "hint: the same command again continues"
        assert len(row_files()) == count
    assert f"interrupted: {kept}" in ended.err
    assert not Path("s/sweep.json").exists()
    continued = swept("--json").json
    assert measured == ["int8", "int4", *ROWS]
    assert figures(continued) == figures(finished)


def test_a_damaged_row_is_measured_again(
    swept: Swept, finished: dict[str, Any], measured: list[str]
) -> None:
    path = Path("s/rows/v32-pca.json")
    path.write_bytes(path.read_bytes()[:1000])
    ended = swept("--json")
    assert ended.code == 0, ended.err
    assert f"warning: {path} cannot be read; it is measured again" in ended.err
    assert measured == ["v32-pca"]
    assert figures(ended.json) == figures(finished)


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"[]",
        b"\xff",
        b'{"row": "a", "state": "done"}',
        b'{"row": "b", "kind": "plan", "state": "done", "settings": {}, "kv_cache": {"x": 1}, '
        b'"perplexity": {"x": 1}}',
        b'{"row": "a", "kind": "plan", "state": "done", "settings": {}, "kv_cache": null, '
        b'"perplexity": null}',
    ],
)
def test_what_is_no_row_is_not_taken_for_one(tmp_path: Path, damage: bytes) -> None:
    folder = SweepFolder(tmp_path, {})
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "a.json").write_bytes(damage)
    with pytest.raises(RowError, match=r"a\.json"):
        folder.read("a", {})
    assert folder.others(set()) == []
    assert folder.finished() == 0


@pytest.mark.usefixtures("finished")
def test_a_row_of_other_settings_is_measured_again(swept: Swept, measured: list[str]) -> None:
    path = Path("s/rows/v32-pca.json")
    row = json.loads(path.read_text())
    row["settings"]["start"]["seed"] = 1
    path.write_text(json.dumps(row))
    assert swept().code == 0
    assert measured == ["v32-pca"]


@pytest.mark.parametrize("method", ["write_bytes", "replace"])
def test_a_full_disk_leaves_nothing_that_looks_finished(
    swept: Swept, monkeypatch: pytest.MonkeyPatch, measured: list[str], method: str
) -> None:
    real: Any = getattr(Path, method)

    def full(path: Path, *arguments: Any) -> Any:
        if "v48-svd" in path.name:
            if method == "write_bytes":
                real(path, arguments[0][:100])
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, *arguments)

    with monkeypatch.context() as disk:
        disk.setattr(Path, method, full)
        ended = swept()
    assert ended.code == 3
    assert "error: s/rows/v48-svd.json could not be written: No space left on device" in ended.err
    assert "3 finished rows kept in s; the same command again continues" in ended.err
    assert row_files() == ["int4.json", "int8.json", "v48-pca.json"]
    assert not Path("s/sweep.json").exists()
    del measured[:]
    assert swept().code == 0
    assert measured == ["v48-svd", "v32-pca", "v32-svd"]


@pytest.mark.usefixtures("finished")
def test_a_sweep_under_way_does_not_look_finished(
    swept: Swept, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_rows(monkeypatch, KeyboardInterrupt(), "pca")
    assert swept(lists=("--v-dim", "16", "--initializer", "pca")).code == 130
    assert not Path("s/sweep.json").exists()
    assert not Path("s/sweep.png").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--v-dim", "32,,16"), "--v-dim '32,,16' has an empty place"),
        (("--v-dim", "32,wide"), "--v-dim '32,wide': wide is not a whole number"),
        (("--v-dim", "0"), "--v-dim '0': 0 is not above zero"),
        (("--v-dim", "-8"), "--v-dim '-8': -8 is not a whole number"),
        (("--v-dim", "3.5"), "--v-dim '3.5': 3.5 is not a whole number"),
        (("--kv-budget", "0"), "--kv-budget '0': 0 is not a fraction above 0 and at most 1"),
        (("--kv-budget", "nan"), "--kv-budget 'nan': nan is not a fraction above 0 and at most 1"),
        (("--kv-budget", "1.5"), "--kv-budget '1.5': 1.5 is not a fraction above 0 and at most 1"),
        (("--initializer", ","), "--initializer ',' has an empty place"),
        (("--v-dim", "32", "--initializer", "pcx"), "pcx"),
        (("--refit", "none,lokal"), "lokal is not a choice, did you mean 'local'?"),
        (("--allocation", "odd"), "--allocation 'odd': odd is not a choice"),
        ((), "how wide?"),
    ],
)
def test_bad_lists_are_one_line(swept: Swept, arguments: tuple[str, ...], says: str) -> None:
    ended = swept(lists=arguments)
    assert ended.code == 2, ended.err
    error, *hint = ended.err.splitlines()
    assert error.startswith("error: ")
    assert says in error
    assert len(hint) <= 1
    assert not Path("s").exists()


def test_a_missing_model_is_one_line(vdcompress: Vdcompress) -> None:
    ended = vdcompress("sweep", "--v-dim", "32")
    assert ended.code == 2
    assert "which model?" in ended.err


@pytest.mark.parametrize("kind", ["file", "other", "run", "damaged"])
def test_a_folder_of_something_else_is_refused(swept: Swept, tiny_run: Path, kind: str) -> None:
    if kind == "file":
        Path("s").write_text("mine")
    elif kind == "run":
        shutil.copytree(tiny_run, "s")
    else:
        Path("s").mkdir()
        Path("s/settings.json" if kind == "damaged" else "s/mine").write_text("{")
    before = sorted(Path("s").rglob("*"))
    ended = swept()
    assert ended.code == 3
    assert ended.err.splitlines()[0].startswith("error: s")
    assert "-o" in ended.err.splitlines()[1]
    assert sorted(Path("s").rglob("*")) == before


def test_bad_text_leaves_nothing(vdcompress: Vdcompress, tiny_neox: Path) -> None:
    Path("short.txt").write_text("too short")
    ended = vdcompress(
        *("sweep", tiny_neox, "--v-dim", "32", *SMALL, "--data", "short.txt", "-o", "s")
    )
    assert ended.code == 3
    assert "nothing was written" not in ended.out
    assert not Path("s").exists()


def test_a_recipe_gives_what_the_lists_leave_open(
    vdcompress: Vdcompress, tiny_neox: Path, text_file: Path
) -> None:
    Path("mine.yaml").write_text(
        f"version: 1\nmodel: {tiny_neox}\nplan: {{v_dim: 48}}\nstart: {{refit: none}}\n"
        f"calibration: {{data: {text_file}, samples: 8, seq_len: 64}}\nevaluation: {{windows: 1}}\n"
    )
    ended = vdcompress("sweep", "--recipe", "mine.yaml", "--initializer", "pca,svd", "--json")
    assert ended.code == 0, ended.err
    assert [row["row"] for row in ended.json["rows"]] == ["v48-pca-none", "v48-svd-none"]


def test_each_row_tells_how_it_ended(tiny_neox: Path, text_file: Path, tmp_path: Path) -> None:
    from conftest import tiny_settings

    recipe = Recipe().merged(tiny_settings(tiny_neox, text_file))
    heard: list[Event] = []
    job = pipeline.new_sweep(recipe, {"v_dim": (32, 1000)}, output=tmp_path / "s")
    pipeline.run_sweep(job, on_event=heard.append)
    rows = [event for event in heard if isinstance(event, RowEnded)]
    assert [event.row for event in rows] == ["int8", "int4", "v32", "v1000"]
    assert rows[2].bytes_per_token == 384
    assert rows[2].perplexity is not None
    assert rows[3].reason == "v_dim 1000 is above the model's 64"


def test_quiet_says_nothing_on_stderr(swept: Swept) -> None:
    assert swept("-q", lists=("--v-dim", "32")).err == ""


def test_combinations_are_the_product() -> None:
    found = variants(Recipe(), {"v_dim": (8, 16, 8), "initializer": ("pca", "svd")})
    assert [label(recipe) for recipe in found] == ["v8-pca", "v8-svd", "v16-pca", "v16-svd"]
    assert len({recipe.model_dump_json() for recipe in found}) == 4
    with pytest.raises(UsageError, match="has no values"):
        variants(Recipe(), {"v_dim": ()})
    with pytest.raises(UsageError, match="'depth'"):
        variants(Recipe(), {"depth": (1,)})


def test_budgets_stand_beside_widths() -> None:
    lists = {"v_dim": (8,), "k_dim": (8, 4), "kv_budget": (0.5,), "groups": (2, 1)}
    found = variants(Recipe(), lists)
    assert [label(recipe) for recipe in found] == [
        "v8-k8-g2",
        "v8-k8-g1",
        "v8-k4-g2",
        "v8-k4-g1",
        "kv0.5-g2",
        "kv0.5-g1",
    ]
    narrow = Recipe().merged({"plan.v_dim": 8, "plan.v_groups": 2})
    [only] = variants(narrow, {"kv_budget": (0.5,)})
    assert (only.plan.v_dim, only.plan.v_groups, only.plan.kv_budget) == (None, 2, 0.5)
    [only] = variants(Recipe().merged({"plan.kv_budget": 0.5}), {"k_dim": (8,)})
    assert (only.plan.k_dim, only.plan.kv_budget) == (8, None)


def test_names_tell_plans_apart() -> None:
    lists = {
        "v_dim": (8,),
        "k_dim": (4,),
        "k_rotary_dim": (0, 2),
        "v_groups": (1, 2),
        "k_groups": (1, 2),
        "allocation": ("uniform", "layers"),
        "target": ("transformers", "vllm"),
        "initializer": ("pca", "svd"),
        "refit": ("none", "local"),
    }
    found = variants(Recipe(), lists)
    assert len(found) == len({label(recipe) for recipe in found}) == 2**7
    assert label(found[0]) == "v8-k4-r0-vg1-kg1-uniform-pca-none"


def test_the_frontier_is_what_nothing_beats() -> None:
    points = {
        "base": (8.0, 1.0),
        "beaten": (6.0, 3.0),
        "few": (2.0, 3.0),
        "less": (5.0, 2.0),
        "twin": (5.0, 2.0),
        "worse": (2.0, 4.0),
        "same size": (8.0, 1.5),
        "same loss": (9.0, 1.0),
    }
    assert frontier(points) == ("few", "less", "twin", "base")
    assert frontier({}) == ()


def document(rows: list[tuple[str, int, float]], references: list[tuple[str, int, float]]) -> Any:
    """Return a sweep's document without a sweep."""

    def row(name: str, size: int, perplexity: float) -> dict[str, Any]:
        return {
            "row": name,
            "state": "done",
            "kv_cache": {"bytes_per_token": size},
            "perplexity": {"compressed": perplexity, "kl": 0.1},
            "plan": {"v_groups": 1, "k_groups": 8},
            "settings": {"plan": {}, "start": {"initializer": name.split("-")[1]}},
        }

    failed = {"row": "v1-bad", "state": "failed", "reason": "why"}
    everything = {"fp16": (100, 10.0)} | {name: (size, ppl) for name, size, ppl in rows}
    all_points = everything | {name: (size, ppl) for name, size, ppl in references}
    return {
        "model": {"id": "a/model"},
        "data": "text.txt",
        "tokens": 1000,
        "window": 100,
        "base": {"name": "fp16", "bytes_per_token": 100, "perplexity": 10.0},
        "rows": [*(row(*entry) for entry in rows), failed],
        "references": [row(f"{name}-x", size, ppl) for name, size, ppl in references],
        "frontier": [name if name != "int8" else "int8-x" for name in frontier(all_points)],
        "plan_frontier": list(frontier(everything)),
    }


def test_the_table_marks_what_nothing_beats() -> None:
    found = document(
        [("v8-pca", 80, 11), ("v4-pca", 60, 20), ("v4-svd", 60, 30)], [("int8", 50, 12)]
    )
    rows = {row[0]: row[1:] for row in sweep_table(found).rows}
    assert list(rows) == ["fp16", "v8-pca", "v4-pca", "v4-svd", "int8-x"]
    assert rows["fp16"] == ("100", "100.0%", "10.00", "", "-", "*")
    assert rows["v8-pca"] == ("80", "80.0%", "11.00", "+10.0%", "0.1000", "*")
    assert [row[-1] for row in rows.values()] == ["*", "*", "+", "", "*"]
    rest = unmeasured_table(found)
    assert rest is not None
    assert rest.rows == (("v1-bad", "failed", "why"),)
    assert unmeasured_table({"references": [], "rows": []}) is None


def test_plans_are_plotted_by_latents_and_initialiser() -> None:
    found = document(
        [("v8-pca", 80, 11), ("v4-pca", 60, 20), ("v4-svd", 60, 30)], [("int8", 50, 12)]
    )
    assert plots.families(found["rows"]) == {
        "V 1, K 8 latents, pca": [(60.0, 20.0), (80.0, 11.0)],
        "V 1, K 8 latents, svd": [(60.0, 30.0)],
    }
    assert plots.sweep(found).startswith(PNG)


@pytest.mark.parametrize("perplexity", [10.0, 9.999, 1e9])
def test_any_sweep_can_be_plotted(perplexity: float) -> None:
    assert plots.sweep(document([("v8-pca", 100, perplexity)], [])).startswith(PNG)
