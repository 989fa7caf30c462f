"""A finetune's settings as arguments of transformers' Trainer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from vdcompress.errors import UsageError
from vdcompress.healing.settings import HealSettings

LOOK_EVERY = 10
_WSD_DECAY = 0.2
_NAMES = {"constant": "constant_with_warmup", "wsd": "warmup_stable_decay"}


def training_arguments(
    settings: HealSettings,
    *,
    windows: int,
    processes: int,
    folder: Path,
    device: torch.device,
    report_to: Sequence[str],
) -> TrainingArguments:
    """Return what Trainer is told.

    Args:
        settings: of the finetune.
        windows: training windows.
        processes: that train together.
        folder: for checkpoints.
        device: where this process's model is.
        report_to: trackers by Trainer's names, such as ``tensorboard``.

    Raises:
        UsageError: a step cannot be divided among processes and forward passes.
    """
    micro, accumulated = divided(settings, windows, processes)
    on_cuda = device.type == "cuda"
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=accumulated,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=_NAMES.get(settings.schedule, settings.schedule),
        lr_scheduler_kwargs=_schedule_arguments(settings, windows),
        warmup_steps=settings.warmup_ratio,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        seed=settings.seed,
        data_seed=settings.seed,
        bf16=on_cuda if settings.bf16 is None else settings.bf16,
        eval_strategy="no",
        save_strategy="no",
        logging_strategy="steps" if report_to else "no",
        logging_steps=LOOK_EVERY,
        logging_nan_inf_filter=False,
        report_to=list(report_to) or "none",
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=on_cuda,
        ddp_find_unused_parameters=settings.target != "outputs",
        ddp_broadcast_buffers=False,
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # one process drives one device
    return arguments


def divided(settings: HealSettings, windows: int, processes: int) -> tuple[int, int]:
    """Return the windows of one forward pass of a process, and how many passes make a step.

    Raises:
        UsageError: they do not divide.
    """
    step = settings.windows_per_step(windows)
    share, rest = divmod(step, processes)
    micro = min(settings.micro_batch or share, share)
    if rest or not share or share % micro:
        parts = f"{processes} processes" if processes > 1 else "one process"
        parts += f" with {settings.micro_batch} per forward pass" if settings.micro_batch else ""
        raise UsageError(
            f"a step of {step} windows cannot be divided among {parts}",
            "choose batch_size as a multiple of processes times micro_batch",
        )
    return micro, share // micro


def _schedule_arguments(settings: HealSettings, windows: int) -> dict[str, Any]:
    if settings.schedule != "wsd":
        return {}
    steps = settings.total_steps(windows)
    left = steps - math.ceil(steps * settings.warmup_ratio)
    return {"num_decay_steps": min(left, math.ceil(_WSD_DECAY * steps)), "decay_type": "linear"}
