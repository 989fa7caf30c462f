"""The course of a finetune: validation after each epoch, early stopping, and what is remembered."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState

from vdcompress.errors import ModelError
from vdcompress.events import EpochEnded, HealingBegan, Progress
from vdcompress.healing.arguments import LOOK_EVERY
from vdcompress.healing.settings import STAGE

if TYPE_CHECKING:
    from vdcompress.healing.trainer import HealTrainer


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
        seconds: spent on all of it, by all calls.
        epoch_seconds: spent on training in this epoch.
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
    seconds: float = 0.0
    epoch_seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)


class Clock:
    """Counts seconds on from those that earlier calls of the same finetune took."""

    def __init__(self) -> None:
        self.begin(0.0)

    def begin(self, before: float) -> None:
        """Start, with so many seconds counted already."""
        self._start = time.perf_counter() - before

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.perf_counter() - self._start


class Epochs(TrainerCallback, ExportableState):
    """Validates after each epoch, stops early, asks for checkpoints, and tells how it goes."""

    def __init__(self, trainer: HealTrainer, steps_per_epoch: int) -> None:
        self.trainer = trainer
        self.steps_per_epoch = steps_per_epoch
        self.note = ""

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps of this callback."""
        return {"args": {}, "attributes": asdict(self.trainer.record)}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure the start, or take up the record of the checkpoint that training resumes from."""
        del args, control, kwargs
        if state.global_step:
            self.trainer.take_up(record_of(state.stateful_callbacks))
            self.trainer.clock.begin(self.trainer.record.seconds)
        else:
            self.trainer.begin()
        record = self.trainer.record
        history = tuple(EpochEnded(**epoch) for epoch in record.history)
        epochs = self.trainer.settings.epochs
        self.trainer.on_event(HealingBegan(_exp(record.initial_loss), epochs, history))

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start an epoch's clock, or go on with it."""
        del args, state, control, kwargs
        self.trainer.epoch_clock.begin(self.trainer.record.epoch_seconds)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell of each step, look at the loss now and then, save where that is asked for."""
        del args, kwargs
        step = state.global_step
        if step % LOOK_EVERY == 0 or not self.note:
            self.note = self._note()
        self.trainer.on_event(Progress(STAGE, step, self.note))
        every = self.trainer.settings.save_steps
        ends_epoch = step % self.steps_per_epoch == 0 or step >= state.max_steps
        if every and step % every == 0 and not ends_epoch:
            control.should_save = True

    def _note(self) -> str:
        """Say how this epoch goes: its number, training perplexity and tokens per second."""
        trainer = self.trainer
        total, tokens = trainer.training_sums()
        speed = tokens / max(trainer.epoch_clock.seconds, 1e-9)
        epoch = len(trainer.record.history) + 1
        return f"epoch {epoch}, train ppl {_perplexity(total, tokens):.4g}, {speed:,.0f} tokens/s"

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Validate; keep the weights if they are the best; stop if patience is over."""
        del args, kwargs
        trainer = self.trainer
        record = trainer.record
        total, tokens = trainer.training_sums()
        trainer.sums.zero_()
        record.tokens_seen += tokens
        seconds = round(trainer.epoch_clock.seconds, 3)
        record.epoch_seconds = 0.0
        self.note = ""
        loss = trainer.validation_loss()
        epoch = len(record.history) + 1
        better = loss < record.best_loss
        if better:
            record.best_loss, record.best_epoch, record.worse = loss, epoch, 0
            trainer.remember()
        else:
            record.worse += 1
        ended = EpochEnded(epoch, _perplexity(total, tokens), _exp(loss), better, tokens, seconds)
        record.history.append(asdict(ended))
        record.finished = (
            record.worse >= trainer.settings.patience or state.global_step >= state.max_steps
        )
        control.should_training_stop = record.finished
        control.should_save = True
        if trainer.args.report_to:
            ppl = {"train_perplexity": ended.train_ppl, "validation_perplexity": ended.val_ppl}
            trainer.log(ppl)
        trainer.on_event(ended)


def record_of(stateful_callbacks: dict[str, Any]) -> Record:
    """Return the record among the states of callbacks that a checkpoint holds."""
    return Record(**stateful_callbacks[Epochs.__name__]["attributes"])


def finished_record(checkpoint: Path) -> Record | None:
    """Return the record of a checkpoint after which nothing is left to train, else None."""
    state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
    record = record_of(state.stateful_callbacks)
    return record if record.finished else None


def finite(loss: float, which: str) -> float:
    """Return the loss, or raise a :class:`ModelError` if it is not a finite number."""
    if not math.isfinite(loss):
        raise ModelError(
            f"the {which} loss became NaN or infinite", "try a lower learning rate, or no bf16"
        )
    return loss


def _perplexity(total: float, tokens: int) -> float:
    return _exp(total / max(tokens, 1))


def _exp(loss: float) -> float:
    return math.exp(min(loss, 700.0))
