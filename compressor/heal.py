"""Heal a compressed model: a short finetune with the base as teacher, by transformers' Trainer.

One process and one device. Checkpoints hold only what is trained, so they are small; a run that
is killed and resumed ends in the same weights as one that never was.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vdcompress.errors import DataError, UsageError
from vdcompress.events import EpochEnded, OnEvent, Warned, ignore
from vdcompress.healing import checkpoints as store
from vdcompress.healing.parameters import own_parameters, trained_names
from vdcompress.healing.settings import STAGE, HealSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from vdcompress.healing.trainer import HealTrainer

__all__ = ["STAGE", "HealSettings", "Healed", "heal"]


@dataclass(frozen=True)
class Healed:
    """What a finetune did.

    Attributes:
        history: the epochs, the first one is number 1.
        best_epoch: the epoch whose weights the student has now; 0 is the start.
        seconds: of this call; a resumed run counts from its resumption.
        tokens_seen: training tokens predicted over the whole run.
        initial_val_ppl: validation perplexity before the first step.
        best_val_ppl: the lowest, that of the student as it is now.
    """

    history: tuple[EpochEnded, ...]
    best_epoch: int
    seconds: float
    tokens_seen: int
    initial_val_ppl: float
    best_val_ppl: float


def heal(
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    train: Tensor,
    validation: Tensor,
    settings: HealSettings | None = None,
    *,
    checkpoints: Path,
    resume: bool = False,
    on_event: OnEvent = ignore,
) -> Healed:
    """Finetune a student in place; afterwards it has the weights of the best epoch.

    Args:
        student: the compressed model, float32. It is never worse than it was on ``validation``.
        teacher: the base model, left unchanged; may share tensors with the student. Needed when
            ``settings.distill``, else not used.
        train: token ids, int64 [n, length].
        validation: token ids, int64 [m, length].
        settings: defaults to :class:`HealSettings`.
        checkpoints: folder for checkpoints, made if need be; they stay after the end.
        resume: go on from the newest complete checkpoint there, or from the start without one.
        on_event: gets :class:`Progress` of stage ``finetune`` and :class:`EpochEnded`.

    Raises:
        UsageError: settings out of range, no teacher to distil from, nothing to train.
        DataError: no windows, or windows of fewer than two tokens.
        RunError: checkpoints lie there and ``resume`` is false, or they are of another run.
        ModelError: a loss became NaN or infinite.
    """
    from vdcompress.healing.trainer import HealTrainer

    started = time.perf_counter()
    settings = settings or HealSettings()
    _check(student, teacher, train, validation, settings)
    teacher = teacher if settings.distill else None
    names = trained_names(student, settings.train)
    identity = _identity(student, names, train, validation, settings)
    store.claim(checkpoints, identity, resume=resume)
    last = store.newest(checkpoints) if resume else None
    if resume and last is None:
        on_event(Warned(f"no complete checkpoint in {checkpoints}: starting from the beginning"))
    own_parameters(student, names, teacher)
    with _only_these_train(student, names), _frozen(teacher, student.device):
        trainer = HealTrainer(
            student,
            teacher=teacher,
            train=train,
            validation=validation,
            settings=settings,
            folder=checkpoints,
            on_event=on_event,
        )
        _run(trainer, last)
        trainer.restore_best()
    record = trainer.record
    return Healed(
        history=tuple(EpochEnded(**epoch) for epoch in record.history),
        best_epoch=record.best_epoch,
        seconds=time.perf_counter() - started,
        tokens_seen=record.tokens_seen,
        initial_val_ppl=math.exp(record.initial_loss),
        best_val_ppl=math.exp(record.best_loss),
    )


def _run(trainer: HealTrainer, last: Path | None) -> None:
    """Train from the start, or go on from a checkpoint that may be the end already."""
    from vdcompress.healing.epochs import finished_record

    if last is None:
        trainer.begin()
    elif record := finished_record(last):
        trainer.record = record
        trainer.load(last)
        return
    trainer.train(resume_from_checkpoint=None if last is None else str(last))


def _check(
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    train: Tensor,
    validation: Tensor,
    settings: HealSettings,
) -> None:
    settings.validate()
    if settings.distill and teacher is None:
        raise UsageError("distillation needs the base as teacher", "or train without distillation")
    if student is teacher:
        raise UsageError("student and teacher are the same model")
    for name, windows in (("training", train), ("validation", validation)):
        if windows.dim() != 2 or not len(windows) or windows.shape[1] < 2:
            raise DataError(
                f"no {name} windows: their shape is {list(windows.shape)}",
                "give at least one window of at least two tokens",
            )


@contextmanager
def _only_these_train(student: nn.Module, names: list[str]) -> Iterator[None]:
    """Let gradients reach some parameters only, and leave everything else as it was."""
    before = {name: p.requires_grad for name, p in student.named_parameters()}
    training = student.training
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(name in names)
    try:
        yield
    finally:
        for name, parameter in student.named_parameters():
            parameter.requires_grad_(before[name])
            parameter.grad = None
        student.train(training)


@contextmanager
def _frozen(teacher: nn.Module | None, device: torch.device) -> Iterator[None]:
    """Put the teacher on the device, in evaluation mode, and back into its mode."""
    if teacher is None:
        yield
        return
    training = teacher.training
    teacher.to(device).eval()
    try:
        yield
    finally:
        teacher.train(training)


def _identity(
    student: nn.Module, names: list[str], train: Tensor, validation: Tensor, settings: HealSettings
) -> dict[str, Any]:
    """Return what must be equal for a resumed run to continue exactly."""
    shapes = [[name, list(student.get_parameter(name).shape)] for name in names]
    return asdict(settings) | {
        "training data": _digest(train),
        "validation data": _digest(validation),
        "parameters": hashlib.sha256(json.dumps(shapes).encode()).hexdigest()[:16],
    }


def _digest(tokens: Tensor) -> str:
    data = tokens.cpu().contiguous().numpy()
    return hashlib.sha256(repr(data.shape).encode() + data.tobytes()).hexdigest()[:16]
