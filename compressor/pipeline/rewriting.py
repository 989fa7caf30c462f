"""Rewrite a base as a plan says, and repair what only a run shows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vdcompress.events import OnEvent, Stopwatch
from vdcompress.repair import needs_repair, repair
from vdcompress.rewrite import rewrite

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from vdcompress.load import Base
    from vdcompress.plan import Plan
    from vdcompress.statistics import Statistics


def compressed_model(
    base: Base, plan: Plan, statistics: Statistics, windows: Tensor, on_event: OnEvent
) -> PreTrainedModel:
    """Return the compressed model, repaired where the plan's start asks for it.

    Args:
        base: the loaded base.
        plan: what the cache keeps.
        statistics: of the base.
        windows: the calibration's token ids [n, length].
        on_event: hears the stages ``rewrite`` and ``repair``.
    """
    watch = Stopwatch(on_event)
    with watch.stage("rewrite", plan.shape.layers):
        model = rewrite(base, plan, statistics, on_event=on_event)
    if needs_repair(plan):
        with watch.stage("repair", len(windows)):
            repair(base, model, plan, windows, on_event=on_event)
    return model
