"""The Trainer beneath healing: our loss, our early stopping, small and sealed checkpoints."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Subset
from transformers import PrinterCallback, Trainer
from transformers.trainer import SCHEDULER_NAME

from vdcompress.events import OnEvent, Warned
from vdcompress.healing import checkpoints, processes, sharding
from vdcompress.healing.arguments import training_arguments
from vdcompress.healing.epochs import Clock, Epochs, Record, finite
from vdcompress.healing.objective import Distilled
from vdcompress.healing.parameters import optimizer_groups
from vdcompress.healing.settings import HealSettings
from vdcompress.healing.top_k_cache import TopK
from vdcompress.healing.windows import Batches, Windows, collate, rows

TRAINED = "trained.safetensors"
BEST = "best.safetensors"


class HealTrainer(Trainer):
    """Trains some parameters of a student and keeps their best values in memory.

    Args:
        distilled: student and teacher; what requires gradients is trained.
        train: windows to learn from, alone or with what the teacher finds likeliest.
        validation: windows that decide when to stop.
        settings: of the finetune.
        folder: for checkpoints.
        report_to: trackers by Trainer's names.
        on_event: hears of the main process.
    """

    def __init__(
        self,
        distilled: Distilled,
        *,
        train: Windows | TopK,
        validation: Windows,
        settings: HealSettings,
        folder: Path,
        report_to: Sequence[str],
        on_event: OnEvent,
    ) -> None:
        distilled._no_split_modules = sharding.layers_of(distilled)
        self.distilled = distilled
        self.settings = settings
        self.folder = folder
        self.validation = validation
        self.on_event = on_event
        steps = settings.steps_per_epoch(len(train))
        used = range(steps * settings.windows_per_step(len(train)))
        arguments = training_arguments(
            settings,
            windows=len(train),
            processes=processes.count(),
            folder=folder,
            device=distilled.student.device,
            report_to=report_to,
        )
        super().__init__(
            distilled,
            arguments,
            data_collator=collate,
            train_dataset=Subset(train, used)
            if isinstance(train, TopK)
            else Batches(train, len(used)),
        )
        self.remove_callback(PrinterCallback)
        self.best: dict[str, Tensor] = {}
        self.failed = ""
        self.sums = torch.zeros(2, dtype=torch.float64, device=arguments.device)
        self.record = Record(math.inf, math.inf)
        self.clock, self.epoch_clock = Clock(), Clock()
        self.add_callback(Epochs(self, steps))

    def create_accelerator_and_postprocess(self) -> None:
        """Create the accelerator, and settle how it shards."""
        super().create_accelerator_and_postprocess()
        sharding.settle(self.accelerator)
        self.is_fsdp_enabled = getattr(self.accelerator.state, "fsdp_plugin", None) is not None

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Create AdamW with a rate for each group of parameters."""
        del model
        if self.optimizer is None:
            kind, options = self.get_optimizer_cls_and_kwargs(self.args)
            groups = optimizer_groups(self.distilled.student, self.settings)
            self.optimizer = kind(groups, **options)
        return self.optimizer

    def begin(self) -> None:
        """Measure the start, which is the best until an epoch is better."""
        loss = self.validation_loss()
        self.record = Record(best_loss=loss, initial_loss=loss)
        self.remember()

    def validation_loss(self) -> float:
        """Return the mean cross-entropy on the validation windows, shared by the processes.

        All processes run the model equally often, as sharded models must be.

        Raises:
            ModelError: it is not a finite number.
        """
        model, count, device = self.model_wrapped, processes.count(), self.args.device
        model.eval()
        sums = torch.zeros(2, dtype=torch.float64, device=device)
        share = math.ceil(len(self.validation) / count)
        mine = range(processes.rank(), len(self.validation), count)
        with torch.no_grad():
            for start in range(0, share, self.args.per_device_train_batch_size):
                chosen = mine[start : start + self.args.per_device_train_batch_size]
                batch = rows(self.validation, chosen or range(1)).to(device)
                found = model(input_ids=batch, measure=True)
                if chosen:
                    sums[0] += found["cross_entropy"]
                    sums[1] += found["tokens"]
        sharding.reshard(model)
        total, tokens = processes.added(sums).tolist()
        return finite(total / tokens, "validation")

    def training_sums(self) -> tuple[float, int]:
        """Return this epoch's summed cross-entropy and its tokens, over all processes.

        Raises:
            ModelError: the loss is not a finite number.
        """
        total, tokens = processes.added(self.sums).tolist()
        return finite(total, "training"), int(tokens)

    def take_up(self, record: Record) -> None:
        """Go on from a record, with its sums in the main process, as after a resumption."""
        self.record = record
        if processes.is_main():
            self.sums.copy_(
                torch.tensor([record.loss_sum, record.loss_tokens], dtype=torch.float64)
            )
        else:
            self.sums.zero_()

    def trained(self) -> dict[str, nn.Parameter]:
        """Return the student's parameters that train, by name; they may be sharded."""
        return sharding.named(self.distilled.student)

    def remember(self) -> None:
        """Keep a copy of the trained parameters as the best ones."""
        self.best = {name: sharding.whole(p) for name, p in self.trained().items()}

    def load_best(self, checkpoint: Path) -> None:
        """Take the best values from a complete checkpoint."""
        self.best = load_file(checkpoint / BEST)

    def restore_best(self, student: nn.Module) -> None:
        """Put the best values into a student that is whole."""
        sharding.assign({name: student.get_parameter(name) for name in self.best}, self.best)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Return the mean objective per predicted token, and add up the cross-entropy."""
        del return_outputs, num_items_in_batch
        found: dict[str, Tensor] = model(**inputs)
        self.sums[0] += found["cross_entropy"]
        self.sums[1] += found["tokens"]
        return found["loss"]

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Count nothing: the count would cost more than a small step."""
        del inputs
        return 0

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save, seal and prune; a disk that is full costs the checkpoint, not the run."""
        record = self.record
        record.loss_sum, record.loss_tokens = self.training_sums()
        record.seconds = self.clock.seconds
        record.epoch_seconds = self.epoch_clock.seconds if record.loss_tokens else 0.0
        self.take_up(record)
        checkpoint = self.folder / f"checkpoint-{self.state.global_step}"
        self.failed = ""
        try:
            super()._save_checkpoint(model, trial)
        except (OSError, RuntimeError, SafetensorError) as error:
            self.failed = self.failed or _reason(error)
        failures = processes.gathered(self.failed)
        if processes.is_main():
            self._seal(checkpoint, next(filter(None, failures), ""))

    def _seal(self, checkpoint: Path, failed: str) -> None:
        """Seal a checkpoint that all processes have written, or remove what is left of it."""
        try:
            if not failed:
                checkpoints.seal(checkpoint)
                checkpoints.prune(self.folder)
        except OSError as error:
            failed = _reason(error)
        if failed:
            shutil.rmtree(checkpoint, ignore_errors=True)
            self.on_event(Warned(f"checkpoint {checkpoint.name} could not be saved: {failed}"))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save what is trained, and its best values; the rest of the model never changes."""
        checkpoint = self.folder if output_dir is None else Path(output_dir)
        now = {name: sharding.whole(p) for name, p in self.trained().items()}
        try:
            checkpoint.mkdir(parents=True, exist_ok=True)
            if processes.is_main():
                save_file(now, checkpoint / TRAINED)
                save_file(self.best, checkpoint / BEST)
        except (OSError, SafetensorError) as error:  # the others wait for what comes next
            self.failed = _reason(error)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Save the optimiser's state; Trainer would save a sharded model beside it."""
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        from accelerate.utils import save_fsdp_optimizer

        plugin = self.accelerator.state.fsdp_plugin
        save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
        scheduler = self.lr_scheduler
        if processes.is_main() and scheduler is not None:
            torch.save(scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        """Load trained and best parameters from a complete checkpoint."""
        del model
        checkpoint = Path(resume_from_checkpoint)
        sharding.assign(self.trained(), load_file(checkpoint / TRAINED))
        self.load_best(checkpoint)


def _reason(error: BaseException) -> str:
    """Return an error's first line; torch's own for a full disk speaks of positions in a file."""
    if isinstance(error, RuntimeError) and "inline_container" in str(error):
        return "a file could not be written whole, is there space left on the disk?"
    return (str(error).strip().splitlines() or ["unknown"])[0]
