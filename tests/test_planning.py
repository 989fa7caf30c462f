"""Plans that wait for calibration, on their way through the pipeline and the program."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import vdcompress as vd
from conftest import Vdcompress, tiny_settings
from synthetic import model_gains
from vdcompress.events import Event, StageStarted
from vdcompress.gains import LayerGains
from vdcompress.pipeline.apply import preview
from vdcompress.pipeline.planning import group_counts, wants_hint
from vdcompress.plan import ModelShape
from vdcompress.recipe import Recipe, load_recipe
from vdcompress.request import Request

SMALL = ("--samples", "8", "--seq-len", "64", "--windows", "2")
NEOX = ModelShape("gpt_neox", layers=6, hidden=512, heads=8, kv_heads=8, head_dim=64, rotary_dim=16)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...] | None]:
    """Measure gains that do not depend on the model; return which groups were asked for."""
    calls: list[tuple[int, ...] | None] = []

    def gains(
        shape: ModelShape, statistics: Any, groups: Sequence[int] | None = None
    ) -> tuple[LayerGains, ...]:
        assert statistics.tokens == 512
        calls.append(None if groups is None else tuple(groups))
        return model_gains(shape)

    monkeypatch.setattr("vdcompress.gains.gains", gains)
    return calls


def test_a_budget_is_planned_after_calibration_and_nothing_is_written(
    vdcompress: Vdcompress, tiny_neox: Path, text_file: Path, asked: list[Any]
) -> None:
    arguments = ("apply", tiny_neox, "--kv-budget", "0.5", *SMALL, "--data", text_file, "--dry-run")
    found = vdcompress(*arguments, "--json").json
    assert found["dry_run"] is True
    assert found["run"] is None
    assert found["kv_cache"]["reduction"] >= 0.5
    assert asked == [(1, 2, 4)]
    predicted = found["predicted_loss"]
    parts = ("v", "k_nope", "k_rotary")
    assert predicted["total"] == pytest.approx(sum(predicted[part] for part in parts))
    for part in parts:
        assert predicted[part] == pytest.approx(sum(la[part] for la in predicted["layers"]))
    assert {"load", "calibrate", "plan"} <= set(found["seconds"])
    assert "rewrite" not in found["seconds"]
    shown = vdcompress(*arguments)
    assert shown.code == 0, shown.err
    for words in ("predicted loss", "bytes per token", "nothing was written", "per token in the"):
        assert words in shown.out
    assert f"({predicted['total']:.4f} nats per token)" in shown.out
    assert not Path("runs").exists()


def test_other_plans_are_previewed_without_weights(
    vdcompress: Vdcompress, tiny_llama: Path, tmp_path: Path, asked: list[Any]
) -> None:
    config = tmp_path / "config-only"
    config.mkdir()
    (config / "config.json").write_bytes((tiny_llama / "config.json").read_bytes())
    arguments = ("apply", config, "--groups", "1", "--v-dim", "16", "--k-dim", "16", "--dry-run")
    found = vdcompress(*arguments, "--json").json
    assert found["plan"]["v_groups"] == found["plan"]["k_groups"] == 1
    assert found["predicted_loss"] is None
    assert found["kv_cache"]["reduction"] == 0.5
    assert asked == []
    assert "mapped behind" in vdcompress(*arguments).out


def test_shared_frequencies_are_shown(
    vdcompress: Vdcompress, tiny_neox: Path, text_file: Path, asked: list[Any]
) -> None:
    arguments = ("--groups", "1", "--v-dim", "24", "--k-dim", "24", *SMALL, "--data", text_file)
    ended = vdcompress("apply", tiny_neox, *arguments, "--dry-run")
    assert ended.code == 0, ended.err
    assert asked == [(1,)]
    assert "rotary frequencies that each K latent keeps" in ended.out


def test_a_bare_width_is_compared_with_one_shared_latent(
    vdcompress: Vdcompress, tiny_neox: Path, text_file: Path, asked: list[Any]
) -> None:
    ended = vdcompress("apply", tiny_neox, "--v-dim", "32", *SMALL, "--data", text_file, "-o", "r")
    assert ended.code == 0, ended.err
    assert asked == []
    shared = json.loads(Path("r/results.json").read_text())["shared_latent"]
    assert (shared["v_groups"], shared["v_dim"]) == (1, 32)
    left_out = shared["left_out"]
    assert 0 < left_out["shared"] < left_out["per_head"] < 1
    assert f"leaves out {left_out['per_head']:.2%} of what attention writes" in ended.err
    assert f"leaves out {left_out['shared']:.2%} in the same bytes (--groups 1)" in ended.err


def test_without_weights_sharing_is_only_mentioned(
    vdcompress: Vdcompress, tiny_neox: Path, asked: list[Any]
) -> None:
    arguments = ("apply", tiny_neox, "--dry-run", "--v-dim", "32")
    assert "--groups 1" in vdcompress(*arguments).err
    assert "--groups 1" not in vdcompress(*arguments, "--k-dim", "32").err
    assert "--groups 1" not in vdcompress(*arguments, "--groups", "2").err
    assert "--groups 1" not in vdcompress("apply", tiny_neox, "--dry-run", "--v-dim", "64").err
    assert asked == []


def test_plans_that_cannot_be_are_refused_before_anything_is_loaded(
    vdcompress: Vdcompress, tiny_neox: Path, asked: list[Any]
) -> None:
    for arguments, says in (
        (("--kv-budget", "1.5"), "kv_budget 1.5"),
        (("--kv-budget", "0.5", "--v-dim", "32"), "kv_budget excludes v_dim"),
        (("--v-dim", "32", "--for", "vllm"), "K and V of one width"),
        (("--v-dim", "32", "--groups", "3"), "v_groups 3 does not divide 4"),
        (("--k-groups", "2"), "how wide?"),
    ):
        ended = vdcompress("apply", tiny_neox, *arguments, "--data", "nowhere.txt")
        assert ended.code == 2
        assert says in ended.err
        assert "load" not in ended.err


def test_compress_takes_the_same_words(tiny_llama: Path, text_file: Path, asked: list[Any]) -> None:
    settings = tiny_settings(tiny_llama, text_file)
    overrides = {name: settings[name] for name in settings if name.startswith("calibration")}
    heard: list[Event] = []
    done = vd.compress(
        str(tiny_llama), kv_budget=0.5, target="vllm", overrides=overrides, on_event=heard.append
    )
    assert asked == [(1, 2)]
    layout = done.plan.common(lambda la: (la.v_groups, la.k_groups, la.v_dim, la.k_dim))
    assert layout is not None
    assert (layout[0], layout[2]) == (layout[1], layout[3])
    assert done.plan.reduction >= 0.5
    assert done.model.config.num_key_value_heads == layout[0]
    stages = [event.stage for event in heard if isinstance(event, StageStarted)]
    assert stages[:5] == ["load", "read text", "calibrate", "plan", "rewrite"]


def test_runs_carry_the_name_of_their_plan(
    tiny_neox: Path, text_file: Path, vdcompress: Vdcompress, asked: list[Any]
) -> None:
    ended = vdcompress("apply", tiny_neox, "--v-dim", "32", *SMALL, "--data", text_file)
    assert ended.code == 0, ended.err
    [run] = Path("runs").iterdir()
    assert "-v32-" in run.name


def test_recipes_plan_keys_and_shared_latents(tiny_neox: Path) -> None:
    recipe = load_recipe("pythia-70m-kv320").merged(
        {"model": str(tiny_neox), "plan.v_dim": 32, "plan.k_dim": 32}
    )
    assert preview(recipe)["kv_cache"]["reduction"] == 0.5
    section = load_recipe("pythia-70m-mqa192").plan
    assert (section.groups, section.v_dim, section.k_dim) == (1, 192, 192)
    assert Recipe().plan.target == "transformers"


@pytest.mark.parametrize(
    ("request_", "counts"),
    [
        (Request(kv_budget=0.5), (1, 2, 4, 8)),
        (Request(kv_budget=0.5, v_groups=1), (1, 2, 4, 8)),
        (Request(kv_budget=0.5, v_groups=1, k_groups=2), (1, 2)),
        (Request(v_dim=64, allocation="layers"), (8,)),
        (Request(k_dim=64, k_groups=1), (1, 8)),
    ],
)
def test_only_those_groups_are_measured_that_a_plan_reads(
    request_: Request, counts: tuple[int, ...]
) -> None:
    assert group_counts(request_, NEOX) == counts


def test_wide_models_and_other_plans_are_not_compared() -> None:
    assert wants_hint(Request(v_dim=320), NEOX)
    for other in (
        Request(v_dim=512),
        Request(v_dim=320, v_groups=1),
        Request(v_dim=320, k_dim=320),
        Request(kv_budget=0.5),
    ):
        assert not wants_hint(other, NEOX)
    wide = ModelShape("llama", 32, 4096, 32, 32, 128, 128)
    assert not wants_hint(Request(v_dim=2048), wide)
