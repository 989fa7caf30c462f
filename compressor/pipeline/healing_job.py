"""A finetune that is to be done or to be continued, and what decides how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vdcompress import runs
from vdcompress.errors import RunError
from vdcompress.healing.checkpoints import any_in, identity_of
from vdcompress.healing.trackers import require
from vdcompress.pipeline.partials import claim, save_state, saved_state
from vdcompress.pipeline.results import read_recipe
from vdcompress.pipeline.settings import heal_settings
from vdcompress.recipe import Recipe


@dataclass(frozen=True)
class Job:
    """A finetune that is to be done or to be continued.

    Attributes:
        run: what is healed.
        recipe: how.
        output: the run that it becomes; checkpoints are in ``<output>.partial`` until then.
        resume: whether it was begun before.
    """

    run: Path
    recipe: Recipe
    output: Path
    resume: bool = False

    @property
    def partial(self) -> Path:
        """Where checkpoints are kept."""
        return runs.partial_of(self.output)

    def save(self) -> None:
        """Write down what ``--resume`` must know."""
        save_state(self.partial, runs.HEALS, self.recipe, run=str(self.run.resolve()))

    @classmethod
    def saved(cls, partial: Path) -> Job:
        """Read what :meth:`save` wrote.

        Raises:
            RunError: it is missing or damaged, or the run that it healed is gone.
        """
        recipe, state = saved_state(partial, runs.HEALS)
        if any_in(partial):
            identity_of(partial)
        return cls(runs.resolve(state["run"]), recipe, runs.finished_of(partial), resume=True)


def new_job(
    run: Path,
    overrides: Mapping[str, Any] | None = None,
    *,
    recipe: Recipe | None = None,
    output: Path | None = None,
    force: bool = False,
    root: Path = runs.ROOT,
) -> Job:
    """Plan to heal a run.

    Args:
        run: a finished run; it is left as it is.
        overrides: settings that beat both recipes, such as ``heal.epochs``.
        recipe: what it says about healing and measuring beats the run's own recipe.
        output: the folder to write; None takes a new one under ``root``.
        force: replace what is in ``output``, and an interrupted finetune that would become it.
        root: the folder of all runs.

    Raises:
        RunError: ``output`` is taken or is ``run``, or a finetune of that name was interrupted.
        UsageError: a value is out of range, or a tracker is not there.
    """
    own = read_recipe(run)
    merged = (own if recipe is None else own.healed_as(recipe)).merged(overrides or {})
    job = Job(run, merged, output or runs.new_healed(run, root))
    heal_settings(merged).validate()
    require(merged.heal.report_to)
    if job.output.resolve() == run.resolve():
        raise RunError(f"{run} is what is to be healed, it is left as it is", "name another folder")
    claim(job.output, force=force)
    return job
