"""The Trainer beneath healing: our loss, our early stopping, small and sealed checkpoints."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import Dataset
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)

from vdcompress.events import OnEvent, Warned
from vdcompress.healing import checkpoints, objective
from vdcompress.healing.divergence import Objective
from vdcompress.healing.epochs import Epochs, Record, finite
from vdcompress.healing.settings import HealSettings

TRAINED = "trained.safetensors"
BEST = "best.safetensors"


class Windows(Dataset[dict[str, Tensor]]):
    """Training windows [n, length] as a data set."""

    def __init__(self, windows: Tensor) -> None:
        self._windows = windows

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self._windows[index]}


class HealTrainer(Trainer):
    """Trains some parameters of a student and keeps their best values in memory."""

    def __init__(
        self,
        student: PreTrainedModel,
        *,
        teacher: PreTrainedModel | None,
        train: Tensor,
        validation: Tensor,
        settings: HealSettings,
        folder: Path,
        on_event: OnEvent,
    ) -> None:
        self.student = student
        self.settings = settings
        self.folder = folder
        self.teacher = teacher
        self.validation = validation
        self.on_event = on_event
        on_cuda = student.device.type == "cuda"
        self.bf16 = on_cuda if settings.bf16 is None else settings.bf16
        self.minimised = Objective(
            kl=settings.kl_weight,
            ce=1.0 if teacher is None else settings.ce_weight,
            temperature=settings.temperature,
            chunk=settings.chunk_tokens,
        )
        arguments = _arguments(settings, folder, student.device)
        whole = settings.steps_per_epoch(len(train)) * settings.windows_per_step(len(train))
        super().__init__(student, arguments, train_dataset=Windows(train[:whole]))
        self.remove_callback(PrinterCallback)
        self.trained = {n: p for n, p in student.named_parameters() if p.requires_grad}
        self.best: dict[str, Tensor] = {}
        self.sums = torch.zeros(2, dtype=torch.float64, device=student.device)
        self.record = Record(math.inf, math.inf)
        self.add_callback(Epochs(self, settings.steps_per_epoch(len(train))))

    def begin(self) -> None:
        """Measure the start, which is the best until an epoch is better."""
        loss = self.validation_loss()
        self.record = Record(best_loss=loss, initial_loss=loss)
        self.remember()

    def validation_loss(self) -> float:
        """Return the mean cross-entropy on the validation windows.

        Raises:
            ModelError: it is not a finite number.
        """
        loss = objective.cross_entropy(
            self.student,
            self.validation,
            batch=self.settings.batch_size,
            chunk=self.settings.chunk_tokens,
            bf16=self.bf16,
        )
        return finite(loss, "validation")

    def training_sums(self) -> tuple[float, int]:
        """Return this epoch's summed cross-entropy and its tokens.

        Raises:
            ModelError: the loss is not a finite number.
        """
        total, tokens = self.sums.tolist()
        return finite(total, "training"), int(tokens)

    def remember(self) -> None:
        """Keep a copy of the trained parameters as the best ones."""
        self.best = {name: p.detach().to("cpu", copy=True) for name, p in self.trained.items()}

    def restore_best(self) -> None:
        """Put the best values into the student."""
        _assign(self.trained, self.best)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Return the mean objective per predicted token, and add up the cross-entropy."""
        del model, return_outputs, num_items_in_batch
        device = self.student.device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.bf16):
            found = objective.losses(
                self.student, self.teacher, inputs["input_ids"], self.minimised
            )
        self.sums[0] += found.cross_entropy
        self.sums[1] += found.tokens
        return found.objective / found.tokens

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Count nothing: the count would cost more than a small step."""
        del inputs
        return 0

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Save, seal and prune; a disk that is full costs the checkpoint, not the run."""
        checkpoint = self.folder / f"checkpoint-{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial)
            checkpoints.seal(checkpoint)
            checkpoints.prune(self.folder)
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(checkpoint, ignore_errors=True)
            reason = str(error).strip().splitlines()[0] if str(error).strip() else "unknown"
            self.on_event(Warned(f"checkpoint {checkpoint.name} could not be saved: {reason}"))

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Save what is trained, and its best values; the rest of the model never changes."""
        del state_dict
        checkpoint = self.folder if output_dir is None else Path(output_dir)
        checkpoint.mkdir(parents=True, exist_ok=True)
        now = {name: p.detach().cpu().contiguous() for name, p in self.trained.items()}
        save_file(now, checkpoint / TRAINED)
        save_file(self.best, checkpoint / BEST)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: torch.nn.Module | None = None
    ) -> None:
        del model
        self.load(Path(resume_from_checkpoint))

    def load(self, checkpoint: Path) -> None:
        """Load trained and best parameters from a complete checkpoint."""
        _assign(self.trained, load_file(checkpoint / TRAINED))
        self.best = load_file(checkpoint / BEST)


def _arguments(settings: HealSettings, folder: Path, device: torch.device) -> TrainingArguments:
    schedules = {"constant": "constant_with_warmup"}
    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=schedules.get(settings.schedule, settings.schedule),
        warmup_steps=settings.warmup_ratio,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        seed=settings.seed,
        data_seed=settings.seed,
        eval_strategy="no",
        save_strategy="no",
        logging_strategy="no",
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=device.type == "cuda",
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # one process drives one device
    return arguments


def _assign(parameters: dict[str, torch.nn.Parameter], values: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(values[name])
