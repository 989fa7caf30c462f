"""Train a model from scratch, in one phase or several, each by :func:`vdcompress.heal.heal`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from vdcompress.events import OnEvent, Stopwatch, ignore
from vdcompress.heal import Healed, heal
from vdcompress.healing import checkpoints as store
from vdcompress.healing import processes
from vdcompress.healing.settings import STAGE, HealSettings


def folders(checkpoints: Path, phases: int) -> tuple[Path, ...]:
    """Return where each phase keeps its checkpoints."""
    return tuple(checkpoints / f"phase-{number}" for number in range(1, phases + 1))


def train_phases(
    model: PreTrainedModel,
    training: Tensor,
    validation: Tensor,
    phases: Sequence[HealSettings],
    *,
    checkpoints: Path,
    resume: bool = False,
    on_event: OnEvent = ignore,
) -> tuple[Healed, ...]:
    """Train in place, by cross-entropy alone; each phase goes on from the best of the one before.

    Args:
        model: float32; what a phase does not train stays frozen in it.
        training: token ids, int64 [n, length].
        validation: token ids, int64 [m, length], that stop each phase.
        phases: settings without distillation, one for each phase; its optimiser is its own.
        checkpoints: folder for those of all phases.
        resume: go on with the phase that was interrupted, from its newest checkpoint.
        on_event: hears stage ``finetune`` once for each phase.

    Raises:
        VDCompressError: as ``heal`` raises.
    """
    watch, done = Stopwatch(on_event), []
    for settings, folder in zip(phases, folders(checkpoints, len(phases)), strict=True):
        begun = resume and processes.shared(partial(store.any_in, folder))
        with watch.stage(STAGE, settings.total_steps(len(training))):
            healed = heal(
                model,
                None,
                training,
                validation,
                settings,
                checkpoints=folder,
                resume=begun,
                on_event=on_event,
            )
        done.append(healed)
    return tuple(done)
