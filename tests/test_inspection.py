"""What ``inspect`` says of a base: its layouts, and with text the energy that latents keep."""

from __future__ import annotations

import itertools
import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest

from conftest import Vdcompress
from synthetic import falling, model_gains
from vdcompress.calibrate import calibrate
from vdcompress.energy import energies, frequency_shares, latent_energies
from vdcompress.gains import NEEDS, LayerGains, gains, latent_gains
from vdcompress.pipeline.inspection import inspect_model
from vdcompress.plan import ModelShape, make_plan

NEOX = ModelShape("gpt_neox", layers=2, hidden=64, heads=4, kv_heads=4, head_dim=16, rotary_dim=4)
LLAMA = ModelShape("llama", layers=2, hidden=64, heads=4, kv_heads=2, head_dim=16, rotary_dim=16)
SMALL = ("--samples", "8", "--seq-len", "64")


@pytest.mark.parametrize("shape", [NEOX, LLAMA], ids=lambda shape: shape.family)
def test_energy_is_the_share_of_the_loss_that_is_kept(shape: ModelShape) -> None:
    found = model_gains(shape)
    rows = energies(found)
    counts = (4, 2, 1) if shape is NEOX else (2, 1)
    assert [(row.layer, row.side, row.groups) for row in rows] == [
        *itertools.product((0,), "v", counts),
        *itertools.product((0,), "k", counts),
        *itertools.product((1,), "v", counts),
        *itertools.product((1,), "k", counts),
    ]
    for row in rows:
        assert row.kept[-1] == 1
        assert row.widths[-1] == shape.kv_dim // row.groups
        assert list(row.kept) == sorted(row.kept)
    first = found[0].v[1]
    shared = next(row for row in rows if (row.side, row.groups) == ("v", 1))
    assert shared.kept[0] == pytest.approx(1 - first[8] / first[0])


def test_energy_of_nothing_is_kept_whole() -> None:
    flat = LayerGains({1: (0.0,) * 17}, {1: (0.0,) * 17}, {})
    assert all(row.kept == (1.0, 1.0) for row in energies([flat]))


def test_frequencies_share_their_energy() -> None:
    (first, _second) = frequency_shares(model_gains(NEOX))
    curves = model_gains(NEOX)[0].k_rotary[4]
    assert sum(first) == pytest.approx(1)
    assert first[0] == pytest.approx(curves[0][0] / (curves[0][0] + curves[1][0]))
    assert frequency_shares(model_gains(LLAMA)) == ((), ())
    still = LayerGains({1: (0.0,)}, {1: falling(random.Random(0), 4)}, {1: ((0.0, 0.0),)})
    assert frequency_shares([still]) == ((0.0,),)


def test_latents_add_up(base: Any, token_windows: Any) -> None:
    """What all latents leave out is the sum of what each does; energies know which is which."""
    shape, statistics = base.shape, calibrate(base, token_windows, needs=NEEDS, batch=4)
    together = gains(shape, statistics, [2])
    alone = latent_gains(shape, statistics, 2)
    for layer, latents in zip(together, alone, strict=True):
        assert len(latents) == 2
        first, second = latents
        sums = [a + b for a, b in zip(first.v[2], second.v[2], strict=True)]
        assert sums == pytest.approx(layer.v[2])
        sums = [a + b for a, b in zip(first.k_nope[2], second.k_nope[2], strict=True)]
        assert sums == pytest.approx(layer.k_nope[2])
        for index, curve in enumerate(layer.k_rotary.get(2, ())):
            parts = zip(first.k_rotary[2][index], second.k_rotary[2][index], strict=True)
            assert [a + b for a, b in parts] == pytest.approx(curve)
    rows = latent_energies(alone)
    assert [(row.layer, row.latent, row.side) for row in rows[:4]] == [
        *itertools.product((0,), (0, 1), "vk")
    ]


def test_layouts_of_a_base_are_costed_and_judged(tiny_neox: Path) -> None:
    found = inspect_model(str(tiny_neox))
    assert found["energy"] is None
    layouts = {layout["options"]: layout for layout in found["layouts"]}
    base, same = layouts[""], layouts["--v-dim 32 --k-dim 32"]
    assert base["bytes_per_token"] == found["kv_cache"]["base_bytes_per_token"]
    assert same["reduction"] == 0.5
    shape = ModelShape(**found["shape"])
    planned = make_plan(shape, v_dim=32, k_dim=32)
    assert same["bytes_per_token"] == planned.bytes_per_token
    assert same["folded"]["weights"] < same["per_head"]["weights"]
    assert any(engine["serves"] for engine in same["serving"])


def test_energy_is_shown_and_drawn(
    vdcompress: Vdcompress, tiny_neox: Path, text_file: Path
) -> None:
    arguments = ("inspect", tiny_neox, "--data", text_file, *SMALL, "-o", "energy.png")
    ended = vdcompress(*arguments)
    assert ended.code == 0, ended.err
    for words in ("energy kept", "each head's latent", "rotary", "drawn in energy.png"):
        assert words in ended.out
    assert Path("energy.png").read_bytes().startswith(b"\x89PNG")
    again = vdcompress(*arguments)
    assert again.code == 2
    assert "energy.png exists already" in again.err
    found = vdcompress(*arguments, "--force", "--json").json
    assert found["plot"] == "energy.png"
    assert found["calibration"]["samples"] == 8
    assert len(found["energy"]) == 2 * 2 * (3 + 4)
    one = [row for row in found["energy"] if row["latent"] == 3 and row["layer"] == 1]
    assert [(row["side"], row["groups"], row["widths"]) for row in one] == [
        ("v", 4, [8, 16]),
        ("k", 4, [8, 16]),
    ]
    assert len(found["frequencies"][0]) == 2


def test_whole_rotary_heads_have_no_table_of_frequencies(
    vdcompress: Vdcompress, tiny_llama: Path, text_file: Path
) -> None:
    arguments = ("inspect", tiny_llama, "--data", text_file, *SMALL)
    ended = vdcompress(*arguments, "--groups", "1")
    assert ended.code == 0, ended.err
    assert "each group's latent" in " ".join(ended.out.split())
    assert "rotary frequencies" not in " ".join(ended.out.split())
    assert list(Path().iterdir()) == []
    odd = vdcompress(*arguments, "--groups", "3")
    assert odd.code == 2
    assert "groups 3 does not divide 2" in odd.err


def test_a_plot_needs_text_and_a_folder(
    vdcompress: Vdcompress, tiny_neox: Path, text_file: Path
) -> None:
    without = vdcompress("inspect", tiny_neox, "-o", "energy.png")
    assert without.code == 2
    assert "--data" in without.err
    latents = vdcompress("inspect", tiny_neox, "--groups", "2")
    assert latents.code == 2
    assert "--data" in latents.err
    nowhere = vdcompress("inspect", tiny_neox, "--data", text_file, "-o", "no/energy.png")
    assert nowhere.code == 2
    assert "there is no folder no" in nowhere.err


def test_a_base_shows_who_serves_which_layout(vdcompress: Vdcompress, tiny_neox: Path) -> None:
    ended = vdcompress("inspect", tiny_neox)
    for words in ("served by", "--groups 1 --v-dim 24 --k-dim 24", "one per head", "FLASH_ATTN"):
        assert words in ended.out


def test_a_run_shows_what_attention_costs(vdcompress: Vdcompress, tiny_run: Path) -> None:
    ended = vdcompress("inspect", tiny_run)
    assert "operations per new token" in ended.out
    found = vdcompress("inspect", tiny_run, "--json").json
    assert found["cost"]["compressed"]["weights"] < found["cost"]["base"]["weights"]


def test_a_run_whose_weights_are_cut_off_is_refused(
    vdcompress: Vdcompress, tiny_run: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(tiny_run, tmp_path / "cut")
    weights = run / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 1)
    ended = vdcompress("inspect", run)
    assert ended.code == 3
    assert "ends within" in ended.err
    assert not ended.out
    weights.unlink()
    assert vdcompress("inspect", run).code == 3
