"""Export: what gets its name was loaded and compared in a process without vdcompress."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from vdcompress import artifact
from vdcompress.artifact import Compressed, load_artifact
from vdcompress.errors import ArtifactError
from vdcompress.export import export
from vdcompress.load import Base
from vdcompress.plan import make_plan
from vdcompress.rewrite import rewrite
from vdcompress.statistics import Statistics

TEXTS = {"results": {}, "recipe": "version: 1\n", "card": "# a card\n"}
ROOM = sys.modules["vdcompress.export"]


@pytest.fixture(scope="module")
def compressed(base: Base, statistics: Statistics) -> Compressed:
    plan = make_plan(base.shape, v_dim=8 * base.shape.kv_heads)
    model = rewrite(base, plan, statistics)
    return Compressed(
        model, base.tokenizer, plan, base.id, None, base.folder, base.dtype, "1234abcd"
    )


def tamper(monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None]) -> None:
    """Change the folder behind the program's back, after its code was copied."""
    copy = artifact._copy_code

    def changed(folder: Path, compressed: Compressed) -> None:
        copy(folder, compressed)
        change(folder)

    monkeypatch.setattr(artifact, "_copy_code", changed)


def answers(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """Let the fresh process say what the model in memory says, but for ``changes``."""

    def reload(folder: Path, ids: list[int], new_tokens: int, tokenizer: Any) -> dict[str, Any]:
        again = load_artifact(folder)
        with torch.no_grad():
            logits = again.model(torch.tensor([ids])).logits[0, -1]
        tokens = len(ids) + new_tokens - 1
        true = {
            "logits": logits.tolist(),
            "tokens": ids,
            "cache_tokens": tokens,
            "cache_bytes": again.plan.cache_bytes(tokens, "float32"),
        }
        return true | {name: change(true[name]) for name, change in changes.items()}

    monkeypatch.setattr(ROOM, "_reload", reload)


@pytest.mark.slow  # the tests of the command line export a GPT-NeoX by default
def test_an_export_is_verified_without_vdcompress(compressed: Compressed, tmp_path: Path) -> None:
    folder = tmp_path / "exported"
    verified = export(compressed, folder, **TEXTS, prompt="values", new_tokens=4)
    assert verified.folder == folder
    assert verified.logit_difference <= 1e-4
    assert verified.text.startswith("values")
    assert verified.cache_bytes_per_token == compressed.plan.cache_bytes(1, "float32")
    assert [path.name for path in tmp_path.iterdir()] == ["exported"]
    assert json.loads((folder / "vdcompress.json").read_text())["calibration"] == "1234abcd"
    assert not list(folder.rglob("__pycache__"))


@pytest.mark.slow
def test_code_that_needs_vdcompress_is_refused(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def needs(folder: Path) -> None:
        path = folder / "latent_model.py"
        path.write_text(path.read_text() + "\nimport vdcompress.plan\n")

    tamper(monkeypatch, needs)
    with pytest.raises(ArtifactError, match=r"does not load in a fresh process.*vdcompress"):
        export(load_artifact(tiny_run), tmp_path / "exported", **TEXTS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "old", "new", "says"),
    [
        ("rope.py", "first * cos - second * sin", "first * cos + second * sin", "other logits"),
        ("cache.py", "x.numel() * x.element_size()", "2 * x.numel()", r"bytes for \d+ tokens"),
        ("attention.py", "import contextlib", "import contextlib, (", "does not load"),
    ],
)
def test_tampered_code_is_refused(
    tiny_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    old: str,
    new: str,
    says: str,
) -> None:
    def change(folder: Path) -> None:
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new))

    tamper(monkeypatch, change)
    with pytest.raises(ArtifactError, match=says):
        export(load_artifact(tiny_run), tmp_path / "exported", **TEXTS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"logits": lambda x: [x[0] + 0.1, *x[1:]]}, "other logits"),
        ({"logits": lambda x: [float("nan"), *x[1:]]}, "other logits"),
        ({"cache_bytes": lambda x: x + 1}, r"bytes for \d+ tokens"),
    ],
)
def test_other_answers_are_refused(
    compressed: Compressed,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    says: str,
) -> None:
    folder = tmp_path / "exported"
    answers(monkeypatch)
    export(compressed, folder, **TEXTS)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    answers(monkeypatch, **changes)
    with pytest.raises(ArtifactError, match=says):
        export(compressed, folder, **TEXTS | {"card": "new"}, force=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["exported"]


def test_an_interrupted_check_leaves_nothing(
    compressed: Compressed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ROOM.subprocess, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export(compressed, tmp_path / "exported", **TEXTS)
    assert list(tmp_path.iterdir()) == []


def test_weights_finer_than_the_storage_are_refused(compressed: Compressed, tmp_path: Path) -> None:
    coarse = replace(compressed, dtype="bfloat16")
    with pytest.raises(ArtifactError, match="finer than bfloat16"):
        export(coarse, tmp_path / "exported", **TEXTS)
    assert list(tmp_path.iterdir()) == []


def test_an_empty_prompt_still_probes(
    compressed: Compressed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers(monkeypatch)
    assert export(compressed, tmp_path / "exported", **TEXTS, prompt="").logit_difference <= 1e-4
