"""The Trainer beneath healing: our loss, our early stopping, small and sealed checkpoints."""

from __future__ import annotations

import math
import shutil
from dataclasses import asdict, dataclass, field
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
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState

from vdcompress import checkpoints, distill
from vdcompress.errors import ModelError
from vdcompress.events import EpochEnded, OnEvent, Progress, Warned
from vdcompress.heal_settings import STAGE, HealSettings

TRAINED = "trained.safetensors"
BEST = "best.safetensors"
_LOOK_EVERY = 10


@dataclass
class Record:
    """How far training has come; saved in each checkpoint.

    Attributes:
        best_loss: lowest validation cross-entropy so far, that of the start included.
        best_epoch: when it was reached; 0 is the start.
        worse: epochs since then.
        finished: nothing is left to train.
        tokens_seen: training tokens predicted in the ended epochs.
        loss_sum: training cross-entropy summed over this epoch's tokens so far.
        loss_tokens: those tokens.
        initial_loss: validation cross-entropy at the start.
        history: the ended epochs, as fields of :class:`EpochEnded`.
    """

    best_loss: float
    initial_loss: float
    best_epoch: int = 0
    worse: int = 0
    finished: bool = False
    tokens_seen: int = 0
    loss_sum: float = 0.0
    loss_tokens: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)


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
        self.minimised = distill.Objective(
            kl=settings.kl_weight,
            ce=1.0 if teacher is None else settings.ce_weight,
            temperature=settings.temperature,
            chunk=settings.chunk_tokens,
        )
        arguments = _arguments(settings, folder, student.device)
        super().__init__(student, arguments, train_dataset=Windows(train))
        self.remove_callback(PrinterCallback)
        self.trained = {n: p for n, p in student.named_parameters() if p.requires_grad}
        self.best: dict[str, Tensor] = {}
        self.sums = torch.zeros(2, dtype=torch.float64, device=student.device)
        self.record = Record(math.inf, math.inf)
        self.add_callback(_Epochs(self, settings.steps_per_epoch(len(train))))

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
        loss = distill.cross_entropy(
            self.student,
            self.validation,
            batch=self.settings.batch_size,
            chunk=self.settings.chunk_tokens,
            bf16=self.bf16,
        )
        return _finite(loss, "validation")

    def training_sums(self) -> tuple[float, int]:
        """Return this epoch's summed cross-entropy and its tokens.

        Raises:
            ModelError: the loss is not a finite number.
        """
        total, tokens = self.sums.tolist()
        return _finite(total, "training"), int(tokens)

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
            found = distill.losses(self.student, self.teacher, inputs["input_ids"], self.minimised)
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


class _Epochs(TrainerCallback, ExportableState):
    """Validates after each epoch, stops early, asks for checkpoints, and tells how it goes."""

    def __init__(self, trainer: HealTrainer, steps_per_epoch: int) -> None:
        self.trainer = trainer
        self.steps_per_epoch = steps_per_epoch

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of this callback."""
        record = self.trainer.record
        record.loss_sum, record.loss_tokens = self.trainer.training_sums()
        return {"args": {}, "attributes": asdict(record)}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take up the record of the checkpoint that training resumes from."""
        del args, control, kwargs
        if state.global_step:
            record = record_of(state.stateful_callbacks)
            self.trainer.record = record
            self.trainer.sums[0] = record.loss_sum
            self.trainer.sums[1] = record.loss_tokens

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the loss now and then, and save within an epoch where that is asked for."""
        del args, kwargs
        step = state.global_step
        if step % _LOOK_EVERY == 0:
            note = f"train_ppl {_perplexity(*self.trainer.training_sums()):.4g}"
            self.trainer.on_event(Progress(STAGE, step, note))
        every = self.trainer.settings.save_steps
        ends_epoch = step % self.steps_per_epoch == 0 or step >= state.max_steps
        if every and step % every == 0 and not ends_epoch:
            control.should_save = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Validate; keep the weights if they are the best; stop if patience is over."""
        del args, kwargs
        trainer = self.trainer
        record = trainer.record
        total, tokens = trainer.training_sums()
        trainer.sums.zero_()
        record.tokens_seen += tokens
        loss = trainer.validation_loss()
        epoch = len(record.history) + 1
        better = loss < record.best_loss
        if better:
            record.best_loss, record.best_epoch, record.worse = loss, epoch, 0
            trainer.remember()
        else:
            record.worse += 1
        ended = EpochEnded(epoch, _perplexity(total, tokens), _exp(loss), better)
        record.history.append(asdict(ended))
        record.finished = (
            record.worse >= trainer.settings.patience or state.global_step >= state.max_steps
        )
        control.should_training_stop = record.finished
        control.should_save = True
        trainer.on_event(ended)


def record_of(stateful_callbacks: dict[str, Any]) -> Record:
    """Return the record among the states of callbacks that a checkpoint holds."""
    return Record(**stateful_callbacks[_Epochs.__name__]["attributes"])


def finished_record(checkpoint: Path) -> Record | None:
    """Return the record of a checkpoint after which nothing is left to train, else None."""
    state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    record = record_of(state.stateful_callbacks)
    return record if record.finished else None


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


def _finite(loss: float, which: str) -> float:
    if not math.isfinite(loss):
        raise ModelError(
            f"the {which} loss became NaN or infinite", "try a lower learning rate, or no bf16"
        )
    return loss


def _perplexity(total: float, tokens: int) -> float:
    return _exp(total / max(tokens, 1))


def _exp(loss: float) -> float:
    return math.exp(min(loss, 700.0))
