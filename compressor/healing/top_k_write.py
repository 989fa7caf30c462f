"""Run the teacher once over the training windows and keep its likeliest next tokens on disk.

The file is written under another name and goes on where it was cut; ``top_k_cache.py`` says what
is in it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from vdcompress.errors import RunError, UsageError
from vdcompress.events import OnEvent, Progress, Stopwatch, ignore
from vdcompress.healing import processes
from vdcompress.healing.checkpoints import write_atomically
from vdcompress.healing.settings import HealSettings
from vdcompress.healing.top_k_cache import (
    TopK,
    TopKIdentity,
    check_identity,
    file_digest,
    seal_path,
    sealed,
)
from vdcompress.healing.windows import Windows, rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel

STAGE = "teacher"
_SAMPLE = 4096


def identify(
    teacher: PreTrainedModel,
    windows: Windows,
    k: int,
    *,
    temperature: float = 1.0,
    bf16: bool = False,
) -> TopKIdentity:
    """Return what :func:`write_top_k` with these arguments would compute from.

    Raises:
        UsageError: there are no windows, or ``k`` is not from 1 to the size of the vocabulary.
    """
    if not len(windows) or windows.length < 2:
        raise UsageError("there are no tokens to predict", "give windows of at least two tokens")
    vocabulary = teacher.get_output_embeddings().weight.shape[0]
    if not 1 <= k <= vocabulary:
        raise UsageError(
            f"teacher_top_k is {k:,}, but the teacher knows {vocabulary:,} tokens",
            "64 is a good value",
        )
    return TopKIdentity(
        k=k,
        count=len(windows),
        length=windows.length,
        vocabulary=vocabulary,
        temperature=float(temperature),
        bf16=bf16,
        data=windows.digest,
        teacher=weights_digest(teacher),
    )


def weights_digest(model: nn.Module) -> str:
    """Return a digest of a model's weights: names, shapes, and some values spread over each."""
    found = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        flat = tensor.detach().reshape(-1)
        values = flat[:: max(1, len(flat) // _SAMPLE)].float().cpu().numpy()
        found.update(repr((name, tuple(tensor.shape))).encode() + values.tobytes())
    return found.hexdigest()[:16]


def write_top_k(
    teacher: PreTrainedModel,
    windows: Windows,
    k: int,
    path: Path,
    *,
    batch: int = 32,
    chunk: int = 1024,
    temperature: float = 1.0,
    bf16: bool = False,
    on_event: OnEvent = ignore,
) -> TopKIdentity:
    """Run the teacher over all windows once and write its ``k`` likeliest next tokens.

    A complete file of the same identity is left as it is; one that was cut goes on after its last
    whole window. One process writes; others wait until it is done.

    Args:
        teacher: put into evaluation mode; runs without gradients on its device.
        windows: n of ``length`` tokens; each token but the last predicts the next.
        k: tokens to keep.
        path: the file; its folder is made if need be.
        batch: windows per forward pass.
        chunk: tokens whose logits exist at one time.
        temperature: divides the logits.
        bf16: compute in bfloat16.
        on_event: gets the stage ``teacher``, with the file's bytes, and its progress in windows.

    Raises:
        UsageError: ``k`` does not fit the vocabulary, or there are no windows.
        RunError: the file is there and was computed from something else, the disk has not enough
            room, or the file cannot be written.
    """
    identity = identify(teacher, windows, k, temperature=temperature, bf16=bf16)
    try:
        if path.exists() and sealed(path) is not None:
            check_identity(path, identity)
            return identity
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        done = _claim(partial, identity)
        _check_disk(path, identity, done)
        with Stopwatch(on_event).stage(STAGE, identity.count), partial.open("ab") as stream:
            size = f"{identity.nbytes / 1e9:.3g} GB"
            on_event(Progress(STAGE, done, size))
            for records in _records(
                teacher, windows, identity, start=done, batch=batch, chunk=chunk
            ):
                stream.write(records.tobytes())
                done += len(records)
                on_event(Progress(STAGE, done, size))
            stream.flush()
            os.fsync(stream.fileno())
        _finish(partial, path, identity)
    except OSError as error:
        raise RunError(
            f"cannot write the teacher's top {k} tokens to {path}: {error.strerror or error}",
            "what is written stays and is gone on with; free the disk, or take a lower k",
        ) from error
    return identity


def kept_top_k(
    teacher: PreTrainedModel,
    windows: Windows,
    settings: HealSettings,
    path: Path,
    *,
    device: torch.device,
    on_event: OnEvent = ignore,
) -> TopK:
    """Let the main process write ``settings.teacher_top_k`` tokens, and read them in all.

    Args:
        teacher: put on the device; it keeps its mode.
        windows: the training windows.
        settings: of the finetune.
        path: the file, on a disk of all processes.
        device: of this process.
        on_event: as :func:`write_top_k`.

    Raises:
        UsageError: as :func:`write_top_k`, or ``teacher_top_k`` is None.
        RunError: as :func:`write_top_k`, or the file is damaged.
    """
    bf16 = device.type == "cuda" if settings.bf16 is None else settings.bf16

    def write() -> TopKIdentity:
        training = teacher.training
        nn.Module.to(teacher, device)
        try:
            return write_top_k(
                teacher,
                windows,
                settings.teacher_top_k or 0,
                path,
                batch=settings.batch_size,
                chunk=settings.chunk_tokens,
                temperature=settings.temperature,
                bf16=bf16,
                on_event=on_event,
            )
        finally:
            teacher.train(training)

    return TopK(windows, path, processes.shared(write))


def top_k_of(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the ``k`` likeliest tokens [n, k] and log-masses [n, k + 1]; the logits are spent.

    Args:
        logits: float32 or float64 [n, v].
        k: from 1 to v; with v the tail's log-mass is -inf.
    """
    top, ids = logits.topk(k)
    tail = logits.scatter_(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    return ids, torch.cat((top, tail), -1).log_softmax(-1)


def _records(
    teacher: PreTrainedModel,
    windows: Windows,
    identity: TopKIdentity,
    *,
    start: int,
    batch: int,
    chunk: int,
) -> Iterator[np.ndarray[Any, Any]]:
    """Yield the records of the windows from ``start`` on, a batch at a time."""
    teacher.eval()
    head, device = teacher.get_output_embeddings(), teacher.device
    shape = (-1, identity.length - 1)
    for first in range(start, len(windows), batch):
        tokens = rows(windows, range(first, min(first + batch, len(windows))))
        inputs = tokens[:, :-1].to(device)
        found = []
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=identity.bf16):
            states = teacher.base_model(input_ids=inputs, use_cache=False).last_hidden_state
            for part in states.flatten(0, 1).split(chunk):
                logits = head(part)
                logits = logits if logits.dtype == torch.float64 else logits.float()
                found.append(top_k_of(logits.div_(identity.temperature), identity.k))
        ids, logprobs = (torch.cat(parts).cpu().numpy() for parts in zip(*found, strict=True))
        records = np.empty(len(inputs), identity.record)
        records["ids"] = ids.reshape(*shape, identity.k)
        records["logprobs"] = logprobs.clip(-65504.0).reshape(*shape, identity.k + 1)
        yield records


def _claim(partial: Path, identity: TopKIdentity) -> int:
    """Return how many windows an earlier call of the same identity wrote, and drop the rest."""
    done = 0
    if sealed(partial) == asdict(identity) and partial.exists():
        done = min(partial.stat().st_size // identity.record.itemsize, identity.count)
    else:
        partial.unlink(missing_ok=True)
        write_atomically(seal_path(partial), json.dumps(asdict(identity), indent=1))
    with partial.open("ab") as stream:
        stream.truncate(done * identity.record.itemsize)
    return done


def _finish(partial: Path, path: Path, identity: TopKIdentity) -> None:
    """Seal a whole file and give it its name; a seal without its file seals nothing."""
    seal = asdict(identity) | {"digest": file_digest(partial)}
    write_atomically(seal_path(path), json.dumps(seal, indent=1))
    partial.replace(path)
    seal_path(partial).unlink(missing_ok=True)


def _check_disk(path: Path, identity: TopKIdentity, done: int) -> None:
    missing = identity.nbytes - done * identity.record.itemsize
    free = shutil.disk_usage(path.parent).free
    if missing > free:
        raise RunError(
            f"the teacher's top {identity.k} of {identity.count * (identity.length - 1):,} tokens "
            f"take {missing / 1e9:,.3g} GB, {path.parent} has {free / 1e9:,.3g} GB free",
            "free the disk, or take a lower teacher_top_k or fewer windows",
        )
