"""Heal a compressed model: a short finetune with the base as teacher, by transformers' Trainer.

In one process, or in as many as a launcher starts: data parallel, or sharded by FSDP2. Checkpoints
hold only what is trained, so they are small; a run that is killed and resumed ends in the same
weights as one that never was.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vdcompress.errors import UsageError
from vdcompress.events import EpochEnded, OnEvent, Warned, ignore
from vdcompress.healing import checkpoints as store
from vdcompress.healing import processes
from vdcompress.healing.divergence import Objective
from vdcompress.healing.objective import Distilled
from vdcompress.healing.parameters import own_parameters, trained_names
from vdcompress.healing.settings import STAGE, HealSettings
from vdcompress.healing.trackers import logging_to, require
from vdcompress.healing.windows import Windows, windows_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from vdcompress.healing.epochs import Record
    from vdcompress.healing.top_k_cache import TopK
    from vdcompress.healing.trainer import HealTrainer

TOP_K = "teacher_top_k.bin"

__all__ = ["STAGE", "HealSettings", "Healed", "heal"]


@dataclass(frozen=True)
class Healed:
    """What a finetune did.

    Attributes:
        settings: by which it trained, what they had left open included.
        history: the epochs, the first one is number 1.
        best_epoch: the epoch whose weights the student has now; 0 is the start.
        seconds: over all calls of a resumed run, up to the checkpoints that it went on from.
        tokens_seen: training tokens predicted over the whole run.
        initial_val_ppl: validation perplexity before the first step.
        best_val_ppl: the lowest, that of the student as it is now.
    """

    settings: HealSettings
    history: tuple[EpochEnded, ...]
    best_epoch: int
    seconds: float
    tokens_seen: int
    initial_val_ppl: float
    best_val_ppl: float


def heal(
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    train: Tensor | Windows,
    validation: Tensor | Windows,
    settings: HealSettings | None = None,
    *,
    checkpoints: Path,
    resume: bool = False,
    report_to: Sequence[str] = (),
    logs: Path | None = None,
    on_event: OnEvent = ignore,
) -> Healed:
    """Finetune a student in place; afterwards it has the weights of the best epoch.

    Under a launcher (torchrun, ``accelerate launch``) all processes call this alike, with the same
    models and windows. Then each has the best weights, and the main one writes and tells.

    Args:
        student: the compressed model, float32. It is never worse than it was on ``validation``.
        teacher: the base model, left unchanged; may share tensors with the student. Needed when
            ``settings.distill``, else not used.
        train: token ids, int64 [n, length], or windows; those beyond the last whole step of an
            epoch are left out.
        validation: token ids, int64 [m, length], or windows.
        settings: defaults to :class:`HealSettings`.
        checkpoints: folder for checkpoints, made if need be; they stay after the end. The main
            process's disk must be that of all. With ``settings.teacher_top_k`` the teacher's
            likeliest tokens are kept there too.
        resume: go on from the newest complete checkpoint there, or from the start without one.
        report_to: trackers that Trainer reports to, such as ``tensorboard``, ``trackio``,
            ``wandb``.
        logs: where trackers write, by default ``<checkpoints>/logs``.
        on_event: gets :class:`Progress` of stages ``finetune`` and ``teacher``,
            :class:`HealingBegan` and :class:`EpochEnded`, in the main process.

    Raises:
        UsageError: settings out of range, no teacher to distil from, nothing to train, a step
            that cannot be divided among processes, a tracker that is not installed.
        DataError: no windows, or windows of fewer than two tokens.
        RunError: checkpoints lie there and ``resume`` is false, or they are of another run.
        ModelError: a loss became NaN or infinite.
    """
    from vdcompress.healing.arguments import divided
    from vdcompress.healing.top_k_write import kept_top_k
    from vdcompress.healing.trainer import HealTrainer

    started = time.perf_counter()
    settings = (settings or HealSettings()).settled()
    _check(student, teacher, settings, report_to)
    training, measuring = windows_of(train, "training"), windows_of(validation, "validation")
    divided(settings, len(training), processes.count())
    processes.begin(student.device.type)
    teacher = teacher if settings.distill else None
    names = trained_names(student, settings.train)
    identity = _identity(student, names, training, measuring, settings)
    on_event = on_event if processes.is_main() else ignore
    last = processes.shared(lambda: _claim(checkpoints, identity, resume, on_event))
    own_parameters(student, names, teacher)
    learned_from: Windows | TopK = training
    if teacher is not None and settings.teacher_top_k is not None:
        path, device = checkpoints / TOP_K, student.device
        learned_from = kept_top_k(
            teacher, training, settings, path, device=device, on_event=on_event
        )
        teacher = None
    with (
        _only_these_train(student, names, settings),
        _beside_its_teacher(student, teacher, settings) as distilled,
        logging_to(logs or checkpoints / "logs", report_to),
    ):
        trainer = HealTrainer(
            distilled,
            train=learned_from,
            validation=measuring,
            settings=settings,
            folder=checkpoints,
            report_to=report_to,
            on_event=on_event,
        )
        trainer.clock.begin(time.perf_counter() - started)
        record = _run(trainer, last)
    trainer.restore_best(student)
    return Healed(
        settings=settings,
        history=tuple(EpochEnded(**epoch) for epoch in record.history),
        best_epoch=record.best_epoch,
        seconds=trainer.clock.seconds,
        tokens_seen=record.tokens_seen,
        initial_val_ppl=math.exp(record.initial_loss),
        best_val_ppl=math.exp(record.best_loss),
    )


def _check(
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    settings: HealSettings,
    report_to: Sequence[str],
) -> None:
    settings.validate()
    if settings.distill and teacher is None:
        raise UsageError("distillation needs the base as teacher", "or train without distillation")
    if student is teacher:
        raise UsageError("student and teacher are the same model")
    require(report_to)


def _claim(folder: Path, identity: dict[str, Any], resume: bool, on_event: OnEvent) -> Path | None:
    """Take a folder for checkpoints; return the newest one if it is to be continued."""
    store.claim(folder, identity, resume=resume)
    last = store.newest(folder, on_event) if resume else None
    if resume and last is None:
        on_event(Warned(f"no complete checkpoint in {folder}: starting from the beginning"))
    return last


def _run(trainer: HealTrainer, last: Path | None) -> Record:
    """Train from the start, or go on from a checkpoint that may be the end already."""
    from vdcompress.healing.epochs import finished_record

    record = None if last is None else finished_record(last)
    if last is not None and record is not None:
        trainer.load_best(last)
        trainer.clock.begin(record.seconds)
        return record
    with warnings.catch_warnings():  # torch renames an option that accelerate has
        warnings.filterwarnings("ignore", ".*broadcast_buffers", FutureWarning)
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
    return trainer.record


@contextmanager
def _only_these_train(
    student: PreTrainedModel, names: list[str], settings: HealSettings
) -> Iterator[None]:
    """Let gradients reach some parameters only, and leave everything else as it was."""
    before = {name: p.requires_grad for name, p in student.named_parameters()}
    training = student.training
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(name in names)
    recomputes = settings.gradient_checkpointing
    if recomputes:
        _named(student, "checkpointing_enable")({"use_reentrant": False})
    try:
        yield
    finally:
        if recomputes:
            _named(student, "checkpointing_disable")()
        for name, parameter in student.named_parameters():
            parameter.requires_grad_(before[name])
            parameter.grad = None
        student.train(training)


def _named(student: PreTrainedModel, method: str) -> Callable[..., None]:
    """Return a method that newer transformers call ``activation_...``."""
    new = getattr(student, f"activation_{method}", None)
    return new or getattr(student, f"gradient_{method}")


@contextmanager
def _beside_its_teacher(
    student: PreTrainedModel, teacher: PreTrainedModel | None, settings: HealSettings
) -> Iterator[Distilled]:
    """Put both into one module, on one device, and the teacher back into its mode."""
    from vdcompress.healing import sharding

    objective = Objective(
        kl=settings.kl_weight,
        ce=settings.ce_weight if settings.distill else 1.0,
        temperature=settings.temperature,
        chunk=settings.chunk_tokens,
        hidden=settings.hidden,
        layers=settings.target == "layers",
    )
    training = teacher is not None and teacher.training
    device = student.device
    sharded = sharding.asked_for()
    models = [model for model in (student, teacher) if model is not None]
    for model in models:
        nn.Module.to(model, torch.device("cpu") if sharded else device)
    try:
        copies = [sharding.to_shard(model) for model in models] if sharded else models
        yield Distilled(copies[0], copies[1] if teacher is not None else None, objective)
    finally:
        for model in models:
            nn.Module.to(model, device)
        if teacher is not None:
            teacher.train(training)


def _identity(
    student: nn.Module,
    names: list[str],
    train: Windows,
    validation: Windows,
    settings: HealSettings,
) -> dict[str, Any]:
    """Return what must be equal for a resumed run to continue exactly."""
    from vdcompress.healing import sharding

    shapes = [[name, list(student.get_parameter(name).shape)] for name in names]
    return asdict(settings) | {
        "training data": train.digest,
        "validation data": validation.digest,
        "parameters": hashlib.sha256(json.dumps(shapes).encode()).hexdigest()[:16],
        "processes": processes.count(),
        "sharded": sharding.asked_for(),
    }
