"""Shards: read tensor by tensor as safetensors reads them, written as safetensors writes them."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from vdcompress.errors import ModelError
from vdcompress.shards import Checkpoint, ShardWriter

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def random_state(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Return tensors of several ranks; their order is not that of their names."""
    draw = torch.Generator().manual_seed(0)
    shapes = {"z.weight": (7, 5), "b": (3,), "a.weight": (4, 3, 2), "one": (), "ü.bias": (9,)}
    return {n: torch.randn(shape, generator=draw).to(dtype) for n, shape in shapes.items()}


def on_meta(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.empty(tensor.shape, device="meta") for name, tensor in state.items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", ["5GB", "60B"])
def test_it_reads_what_safetensors_wrote(tmp_path: Path, dtype: torch.dtype, size: str) -> None:
    state = random_state(dtype)
    limit = 10**9 if size == "5GB" else 60
    save_torch_state_dict(state, tmp_path, max_shard_size=limit)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (size == "60B")
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.names == set(state)
    for name, tensor in state.items():
        found = checkpoint.read(name)
        assert found.dtype == dtype
        assert torch.equal(found, tensor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("limit", [10**9, 60])
def test_it_writes_the_bytes_of_safetensors(tmp_path: Path, dtype: torch.dtype, limit: int) -> None:
    state = random_state(dtype)
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.mkdir()
    theirs.mkdir()
    save_torch_state_dict(state, theirs, max_shard_size=limit)
    with ShardWriter(ours, on_meta(state), dtype, limit) as writer:
        for name in reversed(list(state)):
            writer.write(name, state[name].float())
    names = sorted(path.name for path in theirs.iterdir())
    assert sorted(path.name for path in ours.iterdir()) == names
    for name in names:
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name


def test_rows_and_blocks_are_parts_of_the_tensor(tmp_path: Path) -> None:
    state = random_state()
    save_file(state, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    rows = checkpoint.rows("a.weight", [3, 0, 3])
    assert torch.equal(rows, state["a.weight"][[3, 0, 3]])
    blocks = dict(checkpoint.blocks("z.weight", 3 * 5 * 4))
    assert list(blocks) == [0, 3, 6]
    assert torch.equal(torch.cat(list(blocks.values())), state["z.weight"])
    assert [start for start, _ in checkpoint.blocks("one")] == [0]
    assert len(list(checkpoint.blocks("z.weight", 1))) == 7


def test_copies_go_block_by_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vdcompress.shards.BLOCK_BYTES", 40)
    state = random_state()
    save_file(state, tmp_path / "model.safetensors")
    copy = tmp_path / "copy"
    copy.mkdir()
    with ShardWriter(copy, on_meta(state), torch.bfloat16, "5GB") as writer:
        for name in state:
            writer.copy(name, Checkpoint(tmp_path))
    found = load_file(copy / "model.safetensors")
    assert all(torch.equal(found[name], state[name].bfloat16()) for name in state)


def test_older_names(tmp_path: Path) -> None:
    save_file({"old": torch.ones(2), "both": torch.zeros(1)}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path, {"new": "old", "both": "old"})
    assert torch.equal(checkpoint.read("new"), torch.ones(2))
    assert torch.equal(checkpoint.read("both"), torch.zeros(1))


def test_what_is_required(tmp_path: Path) -> None:
    save_file(random_state(), tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    checkpoint.require({"b": (3,), "one": ()})
    with pytest.raises(ModelError, match="lack 2 tensors, the first is c"):
        checkpoint.require({"d": (3,), "c": (3,), "b": (3,)})
    with pytest.raises(ModelError, match=r"b in .* has shape \[3\], not \[4\]"):
        checkpoint.require({"b": (4,)})
    with pytest.raises(ModelError, match="lack nothing"):
        checkpoint.read("nothing")


@pytest.mark.parametrize("left", [0, 7, 100, 500, -1])
def test_truncated_files_are_one_clear_line(tmp_path: Path, left: int) -> None:
    path = tmp_path / "model.safetensors"
    save_file(random_state(), path)
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(ModelError, match=r"cannot be read: model\.safetensors: ") as caught:
        Checkpoint(tmp_path)
    assert "\n" not in caught.value.message
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    "header",
    [
        "[]",
        '{"a": 3}',
        '{"a": {"dtype": "F32", "shape": [2]}}',
        '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        '{"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, -8]}}',
        '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}}',
        '{"a": {"dtype": "F32", "shape": "2", "data_offsets": [0, 8]}}',
        "\\x00",
    ],
)
def test_damaged_headers_are_one_clear_line(tmp_path: Path, header: str) -> None:
    text = header.encode()
    data = struct.pack("<Q", len(text)) + text + b"\0" * 8
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(ModelError, match="cannot be read") as caught:
        Checkpoint(tmp_path)
    assert "\n" not in caught.value.message


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file(random_state(), path)
    checkpoint = Checkpoint(tmp_path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ModelError, match="ends too early"):
        checkpoint.read(max(checkpoint.names))


def test_numbers_that_nobody_reads_do_not_matter(tmp_path: Path) -> None:
    state = {"a": torch.ones(2), "mask": torch.ones(4, dtype=torch.bool)}
    save_file(state, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    assert torch.equal(checkpoint.read("a"), torch.ones(2))
    with pytest.raises(ModelError, match="BOOL are not supported"):
        checkpoint.read("mask")


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no model\.safetensors"):
        Checkpoint(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text("{")
    with pytest.raises(ModelError, match=r"index\.json in .* cannot be read"):
        Checkpoint(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "model-00001-of-00001.safetensors"}}))
    with pytest.raises(ModelError, match=r"lacks the shard model-00001-of-00001\.safetensors"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=str)
def test_what_is_not_finite_is_named(tmp_path: Path, bad: float) -> None:
    state = random_state()
    state["z.weight"][5, 2] = bad
    save_file(state, tmp_path / "model.safetensors")
    checkpoint = Checkpoint(tmp_path)
    checkpoint.rows("z.weight", [4, 6])
    for read in (checkpoint.read, lambda name: list(checkpoint.blocks(name))):
        with pytest.raises(ModelError, match=r"z\.weight in .* NaN or infinity"):
            read("z.weight")


def test_what_overflows_is_not_written(tmp_path: Path) -> None:
    large = {"a": torch.tensor([1e6])}
    with (
        pytest.raises(ModelError, match="not finite in float16"),
        ShardWriter(tmp_path, large, torch.float16, "5GB") as writer,
    ):
        writer.write("a", large["a"])


def test_what_was_not_announced_is_refused(tmp_path: Path) -> None:
    state = random_state()
    writer = ShardWriter(tmp_path, state, torch.float32, "5GB")
    for rows in (torch.ones(8, 5), torch.ones(7, 4)):
        with pytest.raises(ValueError, match=r"z\.weight"):
            writer.write("z.weight", rows)
    with pytest.raises(KeyError):
        writer.write("unknown", torch.ones(1))
    with pytest.raises(ValueError, match="5 tensors were not written"):
        writer.close()
