"""The artefact folder: whole or not at all, and exactly what was written."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vdcompress import artifact
from vdcompress.artifact import Compressed, load_artifact, read_marker, require_free, write_artifact
from vdcompress.errors import ArtifactError, ModelError, PlanError, RunError
from vdcompress.load import Base, load
from vdcompress.plan import make_plan
from vdcompress.rewrite import rewrite
from vdcompress.statistics import Statistics

TEXTS = {"results": {"schema": 1}, "recipe": "version: 1\n", "card": "# a card\n"}


@pytest.fixture(scope="module")
def compressed(base: Base, statistics: Statistics) -> Compressed:
    plan = make_plan(base.shape, v_dim=8 * base.shape.kv_heads)
    model = rewrite(base, plan, statistics)
    return Compressed(
        model, base.tokenizer, plan, base.id, base.revision, base.folder, base.dtype, "1234abcd"
    )


@pytest.fixture
def folder(compressed: Compressed, tmp_path: Path) -> Path:
    return write_artifact(tmp_path / "run", compressed, **TEXTS)


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids).logits


# What is written is what is read.


def test_round_trip_is_exact(compressed: Compressed, folder: Path, token_windows: Tensor) -> None:
    again = load_artifact(folder)
    assert again.plan == compressed.plan
    assert again.base_id == compressed.base_id
    assert (again.base_revision, again.dtype, again.calibration) == (None, "float32", "1234abcd")
    assert not again.model.training
    assert again.model.dtype == torch.float32
    ids = token_windows[:2]
    assert torch.equal(logits(again.model, ids), logits(compressed.model, ids))
    state = again.model.state_dict()
    assert all(torch.equal(t, state[n]) for n, t in compressed.model.state_dict().items())


def test_an_artefact_is_written_again_as_it_was(folder: Path, tmp_path: Path) -> None:
    again = write_artifact(tmp_path / "again", load_artifact(folder), **TEXTS)
    assert sorted(p.name for p in again.iterdir()) == sorted(p.name for p in folder.iterdir())
    for path in folder.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes(), path.name


def test_the_files_of_the_design(base: Base, compressed: Compressed, folder: Path) -> None:
    names = {path.name for path in folder.iterdir()}
    code = {f"{base.config.model_type}.py", "attention.py", "cache.py", "layout.py"}
    code |= {"latent_attention.py", "latent_config.py", "latent_model.py", "rope.py"}
    texts = {"vdcompress.json", "recipe.yaml", "results.json", "README.md"}
    assert code | texts | {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert "generation_config.json" in names
    assert "__init__.py" not in names
    assert json.loads((folder / "results.json").read_text()) == TEXTS["results"]
    assert (folder / "recipe.yaml").read_text() == TEXTS["recipe"]
    assert (folder / "README.md").read_text() == TEXTS["card"]
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == f"vdcompress_{base.config.model_type}"
    assert config["kv_layout"] == compressed.plan.to_json()["layers"]
    module, name = config["auto_map"]["AutoModelForCausalLM"].split(".")
    assert (module, name) == (base.config.model_type, config["architectures"][0])


def test_tokenizer_files_are_the_same_bytes(base: Base, folder: Path) -> None:
    copied = [p for p in base.folder.iterdir() if p.name in artifact.COPIED_FILES]
    assert len(copied) >= 3
    for path in copied:
        assert (folder / path.name).read_bytes() == path.read_bytes()


def test_modelling_files_are_the_same_bytes(folder: Path) -> None:
    modeling = Path(artifact.__file__).parent / "modeling"
    for path in folder.glob("*.py"):
        assert path.read_bytes() == (modeling / path.name).read_bytes()


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o027])
def test_files_can_be_read_by_whom_the_umask_allows(
    compressed: Compressed, tmp_path: Path, mask: int
) -> None:
    old = os.umask(mask)
    try:
        folder = write_artifact(tmp_path / "run", compressed, **TEXTS)
    finally:
        os.umask(old)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o777 & ~mask
    for path in folder.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask, path.name


def test_tied_weights_are_stored_once(base: Base, compressed: Compressed, folder: Path) -> None:
    stored = load_file(folder / "model.safetensors")
    tied = base.config.tie_word_embeddings
    assert ("lm_head.weight" in stored) == (not tied)
    model = load_artifact(folder).model
    same = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert same == tied


def test_tied_models(tiny_llama: Path, tmp_path: Path, token_windows: Tensor) -> None:
    from vdcompress.calibrate import calibrate

    base = load(tiny_llama)
    assert base.config.tie_word_embeddings
    plan = make_plan(base.shape, v_dim=16)
    model = rewrite(base, plan, calibrate(base, token_windows))
    compressed = Compressed(model, base.tokenizer, plan, base.id, None, base.folder, base.dtype, "")
    folder = write_artifact(tmp_path / "run", compressed, **TEXTS)
    stored = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in stored
    assert {t.dtype for t in stored.values()} == {torch.bfloat16}
    again = load_artifact(folder).model
    assert again.get_input_embeddings().weight is again.get_output_embeddings().weight
    ids = token_windows[:2]
    assert torch.equal(logits(again, ids), logits(model, ids))


def test_shards(
    compressed: Compressed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, token_windows: Tensor
) -> None:
    monkeypatch.setattr(artifact, "MAX_SHARD_SIZE", "100KB")
    folder = write_artifact(tmp_path / "run", compressed, **TEXTS)
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    again = load_artifact(folder).model
    ids = token_windows[:2]
    assert torch.equal(logits(again, ids), logits(compressed.model, ids))
    shards[0].unlink()
    with pytest.raises(ModelError, match=f"lacks the shard {shards[0].name}"):
        load_artifact(folder)


# Damaged folders.


def test_a_missing_tensor(folder: Path) -> None:
    path = folder / "model.safetensors"
    state = load_file(path)
    name = next(name for name in state if name.endswith("v_compress.weight"))
    del state[name]
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=name.replace(".", r"\.")):
        load_artifact(folder)


def test_a_tensor_of_another_shape(folder: Path) -> None:
    path = folder / "model.safetensors"
    state = load_file(path)
    name = next(name for name in state if name.endswith("v_compress.weight"))
    state[name] = state[name][:-1].contiguous()
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="cannot be read"):
        load_artifact(folder)


def test_a_tensor_that_nobody_reads(folder: Path) -> None:
    path = folder / "model.safetensors"
    state = load_file(path) | {"surplus.weight": torch.zeros(3)}
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"surplus\.weight"):
        load_artifact(folder)


@pytest.mark.parametrize("left", [0, 7, 3000])
def test_truncated_weights(folder: Path, left: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(ModelError, match="cannot be read"):
        load_artifact(folder)


def test_weights_that_are_not_finite(folder: Path) -> None:
    path = folder / "model.safetensors"
    state = load_file(path)
    name = next(name for name in state if name.endswith("v_compress.bias"))
    state[name][0] = torch.nan
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=name.replace(".", r"\.")):
        load_artifact(folder)


def test_weights_that_overflow_are_not_written(compressed: Compressed, tmp_path: Path) -> None:
    large = replace(compressed, dtype="float16")
    name = next(n for n, _ in compressed.model.named_parameters() if n.endswith("v_compress.bias"))
    parameter = compressed.model.get_parameter(name)
    with torch.no_grad():
        kept = parameter[0].item()
        parameter[0] = 1e6
    try:
        with pytest.raises(ModelError, match="float16"):
            write_artifact(tmp_path / "run", large, **TEXTS)
    finally:
        with torch.no_grad():
            parameter[0] = kept
    assert list(tmp_path.iterdir()) == []


def test_no_run_and_unfinished_runs(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no run"):
        load_artifact(tmp_path / "nowhere")
    (folder / "vdcompress.json").unlink()
    with pytest.raises(RunError, match="not a finished run"):
        load_artifact(folder)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", "{}", '{"format": "new"}', '{"format": 1}', "\x00"]
)
def test_unreadable_markers(folder: Path, text: str) -> None:
    (folder / "vdcompress.json").write_text(text)
    with pytest.raises(RunError, match="cannot be read"):
        load_artifact(folder)


def test_future_formats(folder: Path) -> None:
    marker = read_marker(folder)
    path = folder / "vdcompress.json"
    path.write_text(json.dumps(marker | {"format": 2}))
    with pytest.raises(RunError, match="format 2") as caught:
        load_artifact(folder)
    assert "newer" in caught.value.hint
    path.write_text(json.dumps(marker | {"plan": marker["plan"] | {"format": 2}}))
    with pytest.raises(PlanError, match="format 2"):
        load_artifact(folder)


# Taken folders.


def test_an_artefact_is_replaced_only_by_force(compressed: Compressed, folder: Path) -> None:
    (folder / "note.txt").write_text("mine")
    with pytest.raises(RunError, match="holds an artefact already") as caught:
        write_artifact(folder, compressed, **TEXTS)
    assert "--force" in caught.value.hint
    assert (folder / "note.txt").read_text() == "mine"
    write_artifact(folder, compressed, **TEXTS | {"card": "new"}, force=True)
    assert (folder / "README.md").read_text() == "new"
    assert not (folder / "note.txt").exists()
    assert [p.name for p in folder.parent.iterdir()] == ["run"]


@pytest.mark.parametrize("force", [False, True])
def test_foreign_folders_are_never_touched(
    compressed: Compressed, tmp_path: Path, force: bool
) -> None:
    mine = tmp_path / "thesis"
    mine.mkdir()
    (mine / "chapter.txt").write_text("words")
    with pytest.raises(RunError, match="not an artefact"):
        write_artifact(mine, compressed, **TEXTS, force=force)
    assert (mine / "chapter.txt").read_text() == "words"
    with pytest.raises(RunError, match="is a file"):
        write_artifact(mine / "chapter.txt", compressed, **TEXTS, force=force)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis"]


def test_empty_folders_are_free(compressed: Compressed, tmp_path: Path) -> None:
    require_free(tmp_path / "nowhere", force=False)
    (tmp_path / "run").mkdir()
    write_artifact(tmp_path / "run", compressed, **TEXTS)
    assert read_marker(tmp_path / "run")["format"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


# Interrupted writes.

STOPS = [
    (OSError(errno.ENOSPC, "No space left on device"), ArtifactError),
    (KeyboardInterrupt(), KeyboardInterrupt),
    (ZeroDivisionError(), ZeroDivisionError),
]
STOPPED = pytest.mark.parametrize(("error", "seen"), STOPS, ids=["full", "stopped", "broken"])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@STOPPED
@pytest.mark.parametrize(
    "step", ["_write_model", "_copy_code", "_marker", "save_torch_state_dict", "_replace", "check"]
)
@pytest.mark.parametrize("older", [False, True])
def test_interrupted_writes_leave_nothing(
    compressed: Compressed,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
    error: BaseException,
    seen: type[BaseException],
    older: bool,
) -> None:
    folder = tmp_path / "deep" / "run"
    before = {}
    if older:
        write_artifact(folder, compressed, **TEXTS)
        before = contents(folder)

    def stop(*args: Any, **kwargs: Any) -> None:
        raise error

    check = stop if step == "check" else None
    if step != "check":
        monkeypatch.setattr(artifact, step, stop)
    with pytest.raises(seen):
        write_artifact(folder, compressed, **TEXTS | {"card": "new"}, force=True, check=check)
    if older:
        assert contents(folder) == before
        assert [p.name for p in folder.parent.iterdir()] == ["run"]
    else:
        assert not folder.exists()
        assert [p for p in tmp_path.rglob("*") if p.is_file()] == []
        assert [p.name for p in tmp_path.rglob("*")] in ([], ["deep"])


@STOPPED
def test_the_older_artefact_comes_back_when_renaming_fails(
    compressed: Compressed,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    seen: type[BaseException],
) -> None:
    before, rename = contents(folder), Path.rename

    def failing(self: Path, target: Path) -> Path:
        if ".partial-" in self.name:
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(seen):
        write_artifact(folder, compressed, **TEXTS, force=True)
    assert contents(folder) == before
    assert [p.name for p in folder.parent.iterdir()] == ["run"]


@contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """Let the system refuse longer files, as it does when no space is left."""
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, old)


@pytest.mark.parametrize("size", [1000, 100_000])
def test_a_refusal_of_the_system_is_an_artifact_error(
    compressed: Compressed, tmp_path: Path, size: int
) -> None:
    with files_no_larger_than(size), pytest.raises(ArtifactError) as caught:
        write_artifact(tmp_path / "run", compressed, **TEXTS)
    assert "could not be written" in caught.value.message
    assert "\n" not in caught.value.message
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_may_not_be_written(compressed: Compressed, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be made"):
        write_artifact(tmp_path / "file" / "run", compressed, **TEXTS)
    with pytest.raises(RunError, match="cannot be made"):
        require_free(tmp_path / "file" / "run", force=False)
