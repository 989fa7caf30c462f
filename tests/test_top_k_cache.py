"""The teacher's likeliest tokens on disk: what is kept, and what cannot be mistaken for it."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from vdcompress.errors import RunError, UsageError
from vdcompress.events import Event, Progress, StageEnded, StageStarted
from vdcompress.healing.top_k_cache import TopK
from vdcompress.healing.top_k_write import weights_digest, write_top_k
from vdcompress.healing.windows import collate

COUNT, LENGTH, VOCABULARY, K = 7, 9, 31, 5


class Rows:
    """Windows that count how often they are read."""

    def __init__(self, seed: int = 0, digest: str = "rows") -> None:
        draw = torch.Generator().manual_seed(seed)
        self.rows = torch.randint(VOCABULARY, (COUNT, LENGTH), generator=draw)
        self.digest = digest
        self.read: list[int] = []

    length = LENGTH

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> Tensor:
        self.read.append(index)
        return self.rows[index]


def a_teacher(seed: int = 0, vocabulary: int = VOCABULARY) -> GPTNeoXForCausalLM:
    config = GPTNeoXConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=16,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = GPTNeoXForCausalLM(config).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    return model


@pytest.mark.parametrize(("temperature", "vocabulary"), [(1.0, VOCABULARY), (2.0, 70_000)])
def test_it_keeps_what_the_teacher_finds_likeliest(
    temperature: float, vocabulary: int, tmp_path: Path
) -> None:
    teacher, windows = a_teacher(vocabulary=vocabulary), Rows()
    path = tmp_path / "new" / "top_k.bin"

    identity = write_top_k(teacher, windows, K, path, batch=3, chunk=5, temperature=temperature)
    found = TopK(windows, path, identity)

    assert path.stat().st_size == identity.nbytes
    width = 2 if vocabulary == VOCABULARY else 4
    assert identity.nbytes == COUNT * (LENGTH - 1) * (K * (width + 2) + 2)
    assert len(found) == COUNT
    assert sorted(p.name for p in path.parent.iterdir()) == ["top_k.bin", "top_k.bin.json"]
    with torch.no_grad():
        p = (teacher(windows.rows[:, :-1]).logits / temperature).softmax(-1)
    for index in (6, 0, 3):
        item = found[index]
        known, ids = p[index].sort(descending=True)
        assert torch.equal(item["input_ids"], windows.rows[index])
        assert torch.equal(item["top_ids"].long(), ids[:, :K])
        masses = torch.cat((known[:, :K], known[:, K:].sum(-1, keepdim=True)), -1)
        torch.testing.assert_close(item["top_logprobs"].float(), masses.log(), rtol=1e-3, atol=1e-3)


def test_all_tokens_leave_no_tail(tmp_path: Path) -> None:
    windows, path = Rows(), tmp_path / "top_k.bin"

    found = TopK(windows, path, write_top_k(a_teacher(), windows, VOCABULARY, path))

    logprobs = found[0]["top_logprobs"].float()
    assert logprobs[:, -1].exp().sum() == 0
    torch.testing.assert_close(logprobs.exp().sum(-1), torch.ones(8), atol=3e-3, rtol=0)


def test_a_loader_makes_batches_of_it(tmp_path: Path) -> None:
    windows, path = Rows(), tmp_path / "top_k.bin"
    found = TopK(windows, path, write_top_k(a_teacher(), windows, K, path))
    found[0]

    again = pickle.loads(pickle.dumps(found))
    (batch,) = DataLoader(Subset(again, range(COUNT)), COUNT, collate_fn=collate)

    assert batch["input_ids"].shape == (COUNT, LENGTH)
    assert batch["top_ids"].shape == (COUNT, LENGTH - 1, K)
    assert batch["top_logprobs"].shape == (COUNT, LENGTH - 1, K + 1)
    assert torch.equal(batch["top_ids"][4], found[4]["top_ids"])


def test_a_write_that_was_cut_goes_on_and_ends_in_the_same_bytes(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole.bin", tmp_path / "cut.bin"
    identity = write_top_k(a_teacher(), Rows(), K, whole, batch=2)

    def interrupt(event: Event) -> None:
        if isinstance(event, Progress) and event.done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_top_k(a_teacher(), Rows(), K, cut, batch=2, on_event=interrupt)
    assert not cut.exists()
    with pytest.raises(RunError, match="no complete cache"):
        TopK(Rows(), cut, identity)
    partial = tmp_path / "cut.bin.partial"
    written = partial.read_bytes()
    partial.write_bytes(written[: -identity.record.itemsize - 7])  # within the third window

    windows = Rows()
    write_top_k(a_teacher(), windows, K, cut, batch=2)

    assert windows.read == [2, 3, 4, 5, 6]
    assert cut.read_bytes() == whole.read_bytes()
    assert not partial.exists()


def test_what_another_teacher_began_is_not_gone_on_with(tmp_path: Path) -> None:
    path, whole = tmp_path / "top_k.bin", tmp_path / "whole.bin"

    def interrupt(event: Event) -> None:
        if isinstance(event, Progress) and event.done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_top_k(a_teacher(seed=1), Rows(), K, path, batch=2, on_event=interrupt)
    write_top_k(a_teacher(), Rows(), K, path, batch=2)
    write_top_k(a_teacher(), Rows(), K, whole, batch=2)

    assert path.read_bytes() == whole.read_bytes()


def test_a_complete_file_is_not_written_again(tmp_path: Path) -> None:
    path, events, windows = tmp_path / "top_k.bin", [], Rows()
    write_top_k(a_teacher(), windows, K, path, on_event=events.append)
    assert events[0] == StageStarted("teacher", COUNT)
    assert events[-2] == Progress("teacher", COUNT, "1.23e-06 GB")
    assert isinstance(events[-1], StageEnded)
    del events[:], windows.read[:]

    write_top_k(a_teacher(), windows, K, path, on_event=events.append)

    assert events == []
    assert windows.read == []


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"k": K + 1}, "k"),
        ({"temperature": 2.0}, "temperature"),
        ({"bf16": True}, "bf16"),
        ({"windows": Rows(digest="other")}, "data"),
        ({"teacher": a_teacher(seed=1)}, "teacher"),
    ],
)
def test_a_cache_of_something_else_is_refused(
    change: dict[str, Any], named: str, tmp_path: Path
) -> None:
    wanted = {"teacher": a_teacher(), "windows": Rows(), "k": K}
    path, other = tmp_path / "top_k.bin", tmp_path / "other.bin"
    write_top_k(**wanted, path=path)
    changed = wanted | change
    identity = write_top_k(**changed, path=other)

    with pytest.raises(RunError, match=f"something else: {named} differ"):
        write_top_k(**changed, path=path)
    with pytest.raises(RunError, match=f"something else: {named} differ"):
        TopK(changed["windows"], path, identity)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [flip, cut, Path.unlink])
def test_damage_is_found(damage: Any, tmp_path: Path) -> None:
    path = tmp_path / "top_k.bin"
    identity = write_top_k(a_teacher(), Rows(), K, path)
    damage(path)

    with pytest.raises(RunError, match=r"damaged|no complete cache"):
        TopK(Rows(), path, identity)


def test_a_seal_that_is_no_seal(tmp_path: Path) -> None:
    path = tmp_path / "top_k.bin"
    identity = write_top_k(a_teacher(), Rows(), K, path)
    seal = path.with_name("top_k.bin.json")
    known = json.loads(seal.read_text())
    for text in ("", "[]", json.dumps(known | {"digest": None})):
        seal.write_text(text)
        with pytest.raises(RunError):
            TopK(Rows(), path, identity)


def test_a_disk_without_room_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))

    with pytest.raises(RunError, match=r"top 5 of 56 tokens take 1.23e-06 GB.* 1e-06 GB free") as e:
        write_top_k(a_teacher(), Rows(), K, tmp_path / "top_k.bin")

    assert "\n" not in str(e.value)
    assert "teacher_top_k" in e.value.hint


def test_what_the_disk_refuses_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot write the teacher's top 5 tokens"):
        write_top_k(a_teacher(), Rows(), K, tmp_path / "file" / "top_k.bin")


@pytest.mark.parametrize("k", [0, VOCABULARY + 1])
def test_k_must_fit_the_vocabulary(k: int, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="teacher_top_k"):
        write_top_k(a_teacher(), Rows(), k, tmp_path / "top_k.bin")


def test_the_teachers_digest_sees_every_kind_of_change() -> None:
    known = weights_digest(a_teacher())
    assert weights_digest(a_teacher()) == known
    for name in ("gpt_neox.layers.0.attention.dense.bias", "embed_out.weight"):
        model = a_teacher()
        parameters = dict(model.named_parameters())
        parameter = parameters.get(name, model.get_output_embeddings().weight)
        with torch.no_grad():
            parameter.add_(1e-3)
        assert weights_digest(model) != known
