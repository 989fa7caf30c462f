"""``bench``: its document, table and plot; what it leaves out; how it ends."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import StaticCache

from conftest import Vdcompress, tiny_settings
from test_bad_input import assert_refused
from test_compare import PNG
from test_decode_speed import captured_on_cpu
from vdcompress import decode_speed
from vdcompress.artifact import read_marker
from vdcompress.bench_report import size
from vdcompress.cache_kinds import DYNAMIC, OWN, QUANTIZED, STATIC, needed_bytes, prompt_bytes
from vdcompress.cli.bench import tokens
from vdcompress.errors import UsageError
from vdcompress.pipeline import benching
from vdcompress.pipeline.apply import apply_recipe
from vdcompress.pipeline.benching import Workload
from vdcompress.plan import Plan
from vdcompress.plots_bench import benchmark
from vdcompress.recipe import Recipe

SMALL = ("--prefill", "8", "--new-tokens", "2", "--repeats", "2", "--dtype", "float32")
NAMES = ["dynamic", "static", *(kind.name for kind in QUANTIZED), "compressed"]
FIGURES = ("prefill_tokens_per_second", "decode_tokens_per_second", "cache_bytes", "speedup")


@pytest.fixture(scope="module")
def packed_run(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, text_file: Path) -> Path:
    """Return a run of the tiny Llama whose cache is in few bits."""
    folder = tmp_path_factory.mktemp("packed") / "run"
    settings = tiny_settings(tiny_llama, text_file)
    settings |= {"plan.v_dim": 16, "plan.k_bits": 8, "plan.v_bits": 4}
    apply_recipe(Recipe().merged(settings), output=folder)
    return folder


@pytest.fixture(params=["tiny_run", "packed_run"])
def any_run(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def by_cache(rows: list[dict[str, Any]], context: int, batch: int) -> dict[str, dict[str, Any]]:
    return {r["cache"]: r for r in rows if (r["context"], r["batch"]) == (context, batch)}


def test_the_document_has_a_row_for_each(vdcompress: Vdcompress, any_run: Path) -> None:
    ended = vdcompress("bench", any_run, "--context", "64,100", "--batch", "1,3", *SMALL, "--json")

    assert ended.code == 0, ended.err
    found = ended.json
    assert (found["command"], found["complete"], found["plot"]) == ("bench", True, None)
    assert (found["dtype"], found["new_tokens"], found["repeats"]) == ("float32", 2, 2)
    plan = Plan.from_json(found["plan"])
    assert [row["cache"] for row in found["rows"]] == NAMES * 4
    for context, batch in ((64, 1), (100, 1), (64, 3), (100, 3)):
        rows = by_cache(found["rows"], context, batch)
        whole = 2 * plan.base_bytes_per_token * context * batch
        assert rows["compressed"]["cache_bytes"] == batch * plan.cache_bytes(context, "float32")
        assert rows["dynamic"]["cache_bytes"] == rows["static"]["cache_bytes"] == whole
        assert rows["static"]["allocated_bytes"] == whole // context * (context + 3)
        for name in ("dynamic", "static", "compressed"):
            row = rows[name]
            assert row["model"] == ("compressed" if name == "compressed" else "base")
            assert row["state"] == "done"
            assert row["prefill_tokens"] == 8
            assert len(row["rounds"]) == 2
            assert min(row["rounds"]) <= row["decode_tokens_per_second"] <= max(row["rounds"])
            assert row["prefill_tokens_per_second"] > 0
            assert set(row["speedup"]) == {"dynamic", "static"}
            assert row["speedup"].get(name, 1.0) == 1.0
        for kind in QUANTIZED:
            row = rows[kind.name]
            assert row["state"] == "done" or kind.needs in row["reason"]
    assert any("random numbers" in note for note in found["notes"])


def test_the_table_and_the_plot(vdcompress: Vdcompress, tiny_run: Path) -> None:
    command = ("bench", tiny_run, "--context", "1k", *SMALL, "-o", "speed.png")
    ended = vdcompress(*command)

    assert ended.code == 0, ended.err
    assert Path("speed.png").read_bytes().startswith(PNG)
    for words in (
        "batch 1",
        "1,024",
        "compressed",
        "786.4 kB",
        "1.0 MB",
        "random numbers",
        "a prompt of 8 tokens",
    ):
        assert words in ended.out
    assert "drawn in speed.png" in ended.out
    assert "made for 256 tokens" in ended.out
    assert "warning: the model was made for 256 tokens" in ended.err
    assert_refused(vdcompress(*command), 2, "exists already", "--force")


@pytest.fixture
def with_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replay steps as on CUDA, but for those of the static cache, which no graph holds here."""

    def captured(call: Any) -> Any:
        cache = inspect.getclosurevars(call).nonlocals["cache"]
        if type(cache) is StaticCache:
            raise RuntimeError("operation not permitted when stream is capturing")
        return captured_on_cpu(call)

    monkeypatch.setattr(benching, "_has_graphs", lambda _device: True)
    monkeypatch.setattr(decode_speed, "captured", captured)


@pytest.mark.usefixtures("with_graphs")
def test_steps_from_graphs_are_shown_beside_plain_ones(
    vdcompress: Vdcompress, tiny_run: Path, tmp_path: Path
) -> None:
    ended = vdcompress("bench", tiny_run, "--context", "64", *SMALL, "--json")
    assert ended.code == 0, ended.err
    rows = by_cache(ended.json["rows"], 64, 1)
    for name in ("dynamic", "compressed"):
        assert rows[name]["graph_tokens_per_second"] > 0
        assert set(rows[name]["graph_speedup"]) == {"dynamic"}
    assert rows["static"]["state"] == "done"
    assert rows["static"]["graph_tokens_per_second"] is None
    assert "no CUDA graph of a step with the static cache: RuntimeError" in ended.err
    assert any("CUDA graph" in note for note in ended.json["notes"])

    ended = vdcompress("bench", tiny_run, "--context", "64", *SMALL, "-o", tmp_path / "x.png")
    assert ended.code == 0, ended.err
    assert "graph" in ended.out.split("compressed")[0]
    assert (tmp_path / "x.png").read_bytes().startswith(PNG)


def test_what_is_no_workload_is_refused(vdcompress: Vdcompress, tiny_run: Path) -> None:
    def refused(*flags: str) -> Any:
        return vdcompress("bench", tiny_run, *flags)

    assert_refused(refused("--context", "4q"), 2, "--context '4q'", "not a whole number")
    assert_refused(refused("--context", "k"), 2, "--context 'k'")
    assert_refused(refused("--context", "1k,"), 2, "empty place")
    assert_refused(refused("--batch", "0"), 2, "not above zero")
    assert_refused(refused("--prefill", "1,2"), 2, "not one number")
    assert_refused(refused("--device", "abacus"), 2, "not a device")
    assert_refused(refused("-o", "speed.pdf"), 2, "PNG")
    assert_refused(vdcompress("bench", "nowhere"), 3, "nowhere does not exist")
    assert_refused(vdcompress("bench"), 3, "no finished run")


def test_a_workload_of_nothing_is_refused() -> None:
    for wrong in ({"contexts": ()}, {"batches": (0,)}, {"prefill": 0}, {"repeats": 0}):
        with pytest.raises(UsageError, match="above zero"):
            Workload(**wrong)  # type: ignore[arg-type]
    assert [Workload().prompt(context) for context in (100, 9999)] == [100, 1024]
    assert [Workload(prefill=2000).prompt(context) for context in (100, 9999)] == [100, 2000]


def test_what_does_not_fit_is_left_out_with_its_reason(
    vdcompress: Vdcompress, tiny_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = 2_000_000
    monkeypatch.setattr("vdcompress.pipeline.benching.free_memory", lambda _device: room)
    ended = vdcompress("bench", tiny_run, "--context", "64,2k", *SMALL, "--json")

    assert ended.code == 0, ended.err
    small, large = (by_cache(ended.json["rows"], context, 1) for context in (64, 2048))
    assert small["dynamic"]["state"] == "done"
    assert large["dynamic"]["state"] == "skipped"
    assert "GB are free" in large["dynamic"]["reason"]
    assert all(not large["dynamic"][key] for key in FIGURES)

    room = 0
    ended = vdcompress("bench", tiny_run, "--context", "64", *SMALL, "-o", "none.png")
    assert ended.code == 3
    assert "nothing was measured: needs about" in ended.err
    assert "not measured" in ended.out
    assert not Path("none.png").exists()


def test_the_estimate_is_above_what_is_stored(tiny_run: Path) -> None:
    plan = Plan.from_json(read_marker(tiny_run)["plan"])
    whole = plan.base_bytes_per_token * 1000
    assert whole < needed_bytes(plan, DYNAMIC, 1000, 1, "bfloat16") <= 2.5 * whole
    assert 2 * whole < needed_bytes(plan, STATIC, 1000, 1, "float32")
    own = needed_bytes(plan, OWN, 1000, 4, "bfloat16")
    assert 4 * plan.cache_bytes(1000) < own < needed_bytes(plan, DYNAMIC, 1000, 4, "bfloat16")
    assert needed_bytes(plan, QUANTIZED[0], 1000, 1, "bfloat16") < own
    assert prompt_bytes(plan, 10, 3, "float32") > 10 * 3 * plan.shape.hidden * 4


def test_memory_that_runs_out_stays_in_the_table(
    vdcompress: Vdcompress, tiny_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = decode_speed.decode

    def scarce(contender: Any, **work: Any) -> Any:
        if contender.name == "static" and work["context"] > 64:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return decode(contender, **work)

    monkeypatch.setattr(decode_speed, "decode", scarce)
    ended = vdcompress("bench", tiny_run, "--context", "64,100", *SMALL, "--json")

    assert ended.code == 0, ended.err
    row = by_cache(ended.json["rows"], 100, 1)["static"]
    assert (row["state"], row["reason"]) == ("failed", "out of memory")
    assert set(by_cache(ended.json["rows"], 100, 1)["compressed"]["speedup"]) == {"dynamic"}
    assert by_cache(ended.json["rows"], 64, 1)["static"]["state"] == "done"
    assert "out of memory" in vdcompress("bench", tiny_run, "--context", "100", *SMALL).out


def test_an_interruption_shows_what_was_measured(
    vdcompress: Vdcompress, tiny_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = decode_speed.decode
    limit = 100

    def interrupted(contender: Any, **work: Any) -> Any:
        if work["context"] >= limit:
            raise KeyboardInterrupt
        return decode(contender, **work)

    monkeypatch.setattr(decode_speed, "decode", interrupted)
    command = ("bench", tiny_run, "--context", "64,100", *SMALL, "--json")
    ended = vdcompress(*command)

    assert ended.code == 130
    assert {row["context"] for row in ended.json["rows"]} == {64}
    assert ended.json["complete"] is False
    assert f"interrupted: the {len(NAMES)} rows measured so far are shown" in ended.err
    limit = 1
    ended = vdcompress(*command)
    assert (ended.code, ended.out) == (130, "")
    assert "interrupted: nothing was measured" in ended.err


def test_sizes_are_read_and_shown() -> None:
    assert [tokens(text) for text in ("1k", "4K", "4096")] == [1024, 4096, 4096]
    sizes = (None, 12, 1000, 10_485_760, 3e12)
    assert [size(value) for value in sizes] == ["-", "12 B", "1.0 kB", "10.5 MB", "3.0 TB"]


def test_what_is_not_known_is_not_drawn() -> None:
    figures = {"decode_tokens_per_second": 5.0, "cache_bytes": 100, "decode_peak_bytes": None}
    row = {"state": "done", "cache": "dynamic", "context": 64, "batch": 1} | figures
    missing = row | {"state": "skipped", "decode_tokens_per_second": None}

    assert benchmark({"rows": [row, missing]}).startswith(PNG)
    with pytest.raises(UsageError, match="nothing to draw"):
        benchmark({"rows": [missing]})
