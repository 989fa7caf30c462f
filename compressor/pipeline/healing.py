"""``finetune``: heal a run, beside its base as the teacher, and write the result as a new run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vdcompress import runs
from vdcompress.artifact import Compressed, load_artifact, require_free, write_artifact
from vdcompress.card import model_card
from vdcompress.errors import RunError
from vdcompress.events import OnEvent, Stopwatch, Warned, ignore
from vdcompress.heal import Healed, heal
from vdcompress.healing import checkpoints, processes
from vdcompress.load import Base
from vdcompress.pipeline import text
from vdcompress.pipeline.document import (
    Timed,
    document,
    environment,
    judged,
    peak_memory,
)
from vdcompress.pipeline.measure import Measured, measure
from vdcompress.pipeline.opening import open_base_of
from vdcompress.pipeline.results import read_recipe, read_results
from vdcompress.pipeline.settings import heal_settings, settle
from vdcompress.recipe import Recipe, parse
from vdcompress.rounding import round_weights

if TYPE_CHECKING:
    from torch import Tensor

STATE = "finetune.json"


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
        self.partial.mkdir(parents=True, exist_ok=True)
        state: dict[str, Any] = {"version": 1, "run": str(self.run.resolve())}
        state["recipe"] = self.recipe.model_dump(mode="json")
        (self.partial / STATE).write_text(json.dumps(state, indent=2), encoding="utf-8")

    @classmethod
    def saved(cls, partial: Path) -> Job:
        """Read what :meth:`save` wrote.

        Raises:
            RunError: it is missing or damaged, or the run that it healed is gone.
        """
        try:
            state = json.loads((partial / STATE).read_text(encoding="utf-8"))
            run, recipe = Path(state["run"]), parse(state["recipe"], f"recipe in {partial}")
        except (OSError, ValueError, KeyError) as error:
            raise RunError(
                f"{partial} cannot be resumed: no readable {STATE}",
                "delete it and start the finetune again",
            ) from error
        return cls(runs.resolve(run), recipe, runs.finished_of(partial), resume=True)


def new_job(
    run: Path,
    overrides: Mapping[str, Any] | None = None,
    *,
    output: Path | None = None,
    force: bool = False,
    root: Path = runs.ROOT,
) -> Job:
    """Plan to heal a run.

    Args:
        run: a finished run; it is left as it is.
        overrides: settings in place of the run's own recipe, such as ``heal.epochs``.
        output: the folder to write; None takes a new one under ``root``.
        force: replace what is in ``output``, and an interrupted finetune that would become it.
        root: the folder of all runs.

    Raises:
        RunError: ``output`` is taken, or a finetune of that name was interrupted.
    """
    job = Job(run, read_recipe(run).merged(overrides or {}), output or runs.new_healed(run, root))
    require_free(job.output, force=force)
    if job.partial.exists() and not force:
        raise RunError(
            f"{job.partial} holds an interrupted finetune",
            f"continue it with: vdcompress finetune --resume {job.partial}",
        )
    shutil.rmtree(job.partial, ignore_errors=True)
    return job


def finetune_run(
    job: Job, *, force: bool = False, device: str = "cpu", on_event: OnEvent = ignore
) -> dict[str, Any]:
    """Heal a run, or go on with healing it: the command ``finetune``.

    Args:
        job: from :func:`new_job`, or :meth:`Job.saved` to resume.
        force: replace what is in the job's ``output``.
        device: where to train.
        on_event: hears what happens.

    Returns:
        The results, as they are saved in the new run's ``results.json``; nothing in a process
        that is not the main one.

    Raises:
        VDCompressError: as the stages raise.
        KeyboardInterrupt: passed on; the checkpoints stay, and ``Job.saved`` continues.
    """
    on_event = on_event if processes.is_main() else ignore
    timed = Timed(on_event)
    start_memory = peak_memory()
    with Stopwatch(timed).stage("load"):
        compressed = load_artifact(job.run, device=device)
        base = open_base_of(compressed, device)
    job = replace(job, recipe=settle(job.recipe, base.config, timed))
    tokens = text.evaluation_tokens(job.recipe, compressed.tokenizer)
    before = _before(job, compressed, base, tokens, timed) if processes.is_main() else {}
    healed = _heal(job, compressed, base, timed)
    processes.end()
    if not processes.is_main():
        return {}
    if healed.best_epoch == 0:
        start = f"the start (val_ppl={healed.initial_val_ppl:.1f})"
        on_event(Warned(f"no epoch was better than {start}: the weights are as they were"))
    round_weights(compressed.model, compressed.dtype)
    measured = measure(compressed, base, tokens, job.recipe, timed)
    fields = measured.fields(compressed.plan, job.recipe)
    results = document(
        "finetune",
        base,
        compressed.plan,
        run=str(job.output),
        parent=str(job.run),
        kv_cache=fields["kv_cache"],
        **_beside(before, fields),
        healing=_healing(healed),
        gate=judged(job.recipe, measured.quality.ratio),
        seconds=timed.seconds,
        environment=environment(device, start_memory),
    )
    with Stopwatch(timed).stage("write"):
        write_artifact(
            job.output,
            compressed,
            results=results,
            recipe=job.recipe.dumps(),
            card=model_card(results),
            force=force,
        )
    shutil.rmtree(job.partial, ignore_errors=True)
    return results


def _heal(job: Job, compressed: Compressed, base: Base, on_event: OnEvent) -> Healed:
    """Train; the model is changed in place."""
    watch = Stopwatch(on_event)
    with watch.stage("read text"):
        training, validation = processes.shared(
            lambda: text.healing_windows(job.recipe, compressed.tokenizer, on_event)
        )
    processes.shared(job.save)
    settings = heal_settings(job.recipe)
    steps = settings.total_steps(len(training))
    with watch.stage("finetune", steps), _unless_empty(job.partial):
        return heal(
            compressed.model,
            base.model if job.recipe.heal.distill else None,
            training,
            validation,
            settings,
            checkpoints=job.partial,
            resume=job.resume,
            on_event=on_event,
        )


@contextmanager
def _unless_empty(partial: Path) -> Iterator[None]:
    """Keep what an interrupted block leaves in ``partial`` only if there is a checkpoint."""
    try:
        yield
    except BaseException:
        if processes.is_main() and checkpoints.newest(partial) is None:
            shutil.rmtree(partial, ignore_errors=True)
        raise


def _before(
    job: Job, compressed: Compressed, base: Base, tokens: Tensor, on_event: OnEvent
) -> dict[str, Any]:
    """Return the figures before healing: the run's own if they were taken alike, else new ones."""
    made = read_recipe(job.run)
    alike = made.evaluation == job.recipe.evaluation
    if alike and text.evaluation_data(made) == text.evaluation_data(job.recipe):
        return read_results(job.run)
    found: Measured = measure(compressed, base, tokens, job.recipe, on_event)
    return found.fields(compressed.plan, job.recipe)


def _beside(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Put the figures of the healed model beside those of the compressed one."""
    old, new = before["perplexity"], after["perplexity"]
    positions = [
        bucket | {"compressed": earlier["compressed"], "healed": bucket["compressed"]}
        for earlier, bucket in zip(before["positions"], after["positions"], strict=True)
    ]
    perplexity = new | {
        "compressed": old["compressed"],
        "compressed_kl": old.get("compressed_kl", old["kl"]),
        "healed": new["compressed"],
    }
    return {"perplexity": perplexity, "positions": positions}


def _healing(healed: Healed) -> dict[str, Any]:
    return {
        "best_epoch": healed.best_epoch,
        "initial_val_ppl": healed.initial_val_ppl,
        "seconds": round(healed.seconds, 3),
        "tokens": healed.tokens_seen,
        "epochs": [asdict(epoch) for epoch in healed.history],
    }
