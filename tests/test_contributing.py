"""What CONTRIBUTING.md tells newcomers to write is written, and runs."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vdcompress import families, initializers, modeling
from vdcompress.calibrate import calibrate
from vdcompress.errors import ModelError
from vdcompress.load import load, load_config
from vdcompress.plan import Start, make_plan
from vdcompress.recipe import load_recipe
from vdcompress.rewrite import rewrite

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NAMED = re.compile(r"# ([\w./-]+)\n(.*)", re.DOTALL)
ROOMS = {"families": families, "initializers": initializers, "modeling": modeling}


def files() -> dict[str, str]:
    """Return the files that the blocks of Python and YAML hold, by path."""
    blocks = [text for kind, text in BLOCK.findall(TEXT) if kind in ("python", "yaml")]
    named = [NAMED.fullmatch(text) for text in blocks]
    assert all(named), "each block begins with a comment that names its file"
    return {found[1]: found[2] for found in named if found}


def names(folder: str) -> list[str]:
    return [Path(path).stem for path in files() if Path(path).parent.name == folder]


@pytest.fixture
def grown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the package find the files in a folder of this test's own."""
    before = set(sys.modules)
    for path, text in files().items():
        target = tmp_path / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
    for name, package in ROOMS.items():
        folder = str(tmp_path / "compressor" / name)
        monkeypatch.setattr(package, "__path__", [*package.__path__, folder])
    importlib.invalidate_caches()
    yield
    for path in files():
        room, name = Path(path).parent.name, Path(path).stem
        if room in ROOMS and (full := f"vdcompress.{room}.{name}") not in before:
            sys.modules.pop(full, None)
            vars(ROOMS[room]).pop(name, None)


def test_it_shows_one_of_each() -> None:
    folders = sorted(str(Path(path).parent) for path in files())
    assert folders == [
        *(f"compressor/{room}" for room in ("families", "initializers", "modeling")),
        "recipes",
    ]
    assert names("families") == names("modeling")
    for path in files():
        assert not (ROOT / path).exists(), f"{path} exists now: show another"


def test_the_rooms_are_there() -> None:
    rooms = re.findall(r"^\| `([\w./]+)` \|", TEXT, re.MULTILINE)
    assert all((ROOT / room).exists() for room in rooms)
    packages = {path.parent for path in (ROOT / "compressor").glob("*/__init__.py")}
    listed = {(ROOT / room) for room in rooms}
    assert {folder for folder in packages if folder.name != "demo_model"} <= listed


def test_what_it_tells_to_run_is_there() -> None:
    shell = " ".join(text for kind, text in BLOCK.findall(TEXT) if kind == "sh")
    project = (ROOT / "pyproject.toml").read_text()
    for tool in ("pytest", "ruff", "mypy", "pre-commit"):
        assert tool in shell
        assert f'"{tool}>=' in project


@pytest.mark.usefixtures("grown")
def test_the_initialiser_is_found_and_starts(base: Any, statistics: Any) -> None:
    [name] = names("initializers")
    assert name in initializers.available()
    plan = make_plan(base.shape, v_dim=8 * base.shape.kv_heads, start=Start(name, "none", 0))
    model = rewrite(base, plan, statistics)
    attention = base.family.attention_modules(model)[0]
    whole = base.family.weights(base.family.attention_modules(base.model)[0]).v.weight
    kept = attention.v_compress.weight[:, None]  # each row is one of the base's own
    assert bool((kept == whole[None]).all(-1).any(-1).all())


@pytest.mark.usefixtures("grown")
def test_the_command_takes_the_initialiser(vdcompress: Any, tiny_neox: Path) -> None:
    [command] = re.findall(r"`vdcompress (apply MODEL --v-dim N [^`]+)`", TEXT)
    options = command.replace("MODEL", str(tiny_neox)).replace("N ", "32 ").split()
    ended = vdcompress(*options, "--dry-run", "--json")
    assert ended.code == 0, ended.err
    assert ended.json["plan"]["start"]["initializer"] == names("initializers")[0]


@pytest.mark.usefixtures("grown")
def test_the_family_is_found_and_exact(
    tmp_path: Path, tiny_tokenizer: Any, token_windows: Tensor
) -> None:
    folder = save_mistral(tmp_path / "base", tiny_tokenizer)
    base = load(folder)
    assert base.family.model_type == "mistral"
    statistics = calibrate(base, token_windows, batch=4)
    full = rewrite(base, make_plan(base.shape, v_dim=base.shape.kv_dim), statistics)
    narrow = rewrite(base, make_plan(base.shape, v_dim=16), statistics)
    assert full.config.model_type == "vdcompress_mistral"
    with torch.no_grad():
        expected = base.model(token_windows[:2]).logits
        exact, close = full(token_windows[:2]).logits, narrow(token_windows[:2]).logits
    torch.testing.assert_close(exact, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(close, expected, atol=1e-2)


@pytest.mark.usefixtures("grown")
def test_the_family_refuses_what_it_cannot_run(tmp_path: Path, tiny_tokenizer: Any) -> None:
    folder = save_mistral(tmp_path / "base", tiny_tokenizer, sliding_window=64)
    with pytest.raises(ModelError, match="sliding window of 64"):
        load_config(folder)


def test_the_recipe_is_one(tmp_path: Path) -> None:
    [(path, text)] = [item for item in files().items() if item[0].startswith("recipes/")]
    written = tmp_path / Path(path).name
    written.write_text(text)
    recipe = load_recipe(written)
    assert recipe.name == written.stem
    assert recipe.gate is not None
    assert recipe.model in families.get("gpt_neox").aliases


@pytest.mark.slow
def test_contracts_hold_in_a_grown_copy(tmp_path: Path, tiny_tokenizer: Any) -> None:
    """Put the files into a copy of the package: contract tests, then export the new family."""
    package = tmp_path / "site" / "vdcompress"
    places = {"compressor": package, "cli": package / "cli", "recipes": package / "recipes"}
    for name, place in places.items():
        shutil.copytree(ROOT / name, place, ignore=shutil.ignore_patterns("__pycache__"))
    for path, text in files().items():
        top, _, rest = path.partition("/")
        (places[top] / rest).write_text(text)
    new = " or ".join([*names("families"), *names("initializers")])
    contracts = [ROOT / "tests" / f"test_{name}.py" for name in ("families", "initializers")]
    here = os.environ | {"PYTHONPATH": str(tmp_path / "site"), "HF_HUB_OFFLINE": "1"}

    def run(*arguments: str | Path) -> str:
        ended = subprocess.run(
            [sys.executable, *arguments],
            capture_output=True,
            text=True,
            check=False,
            env=here,
            cwd=tmp_path,
        )
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return ended.stdout

    options = ["-q", "-n", "0", "-p", "no:cacheprovider", "-k", new, "--rootdir", ROOT]
    said = run("-m", "pytest", *options, *contracts)
    assert int(re.search(r"(\d+) passed", said)[1]) > 80
    folder = save_mistral(tmp_path / "base", tiny_tokenizer)
    code = f"""
import json, torch, vdcompress
from pathlib import Path
from vdcompress.recipe import shipped
base = vdcompress.load({str(folder)!r})
plan = vdcompress.make_plan(base.shape, v_dim=16)
statistics = vdcompress.calibrate(base, torch.arange(1024).view(16, 64) % 264)
model = vdcompress.rewrite(base, plan, statistics)
finished = vdcompress.Compressed.of(base, plan, model)
vdcompress.export(finished, Path("exported"))
files = sorted(path.name for path in Path("exported").glob("*.py"))
print(json.dumps([files, shipped(), vdcompress.__file__]))
"""
    exported, shipped, where = json.loads(run("-c", code).splitlines()[-1])
    assert {"mistral.py", "llama.py", "latent_model.py"} <= set(exported)
    assert set(names("recipes")) <= set(shipped)
    assert Path(where).parent == package


def save_mistral(folder: Path, tokenizer: Any, **values: Any) -> Path:
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=264,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=96,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=0,
        **values,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MistralForCausalLM(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
