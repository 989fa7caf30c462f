"""``train``: a model from scratch, as a recipe describes it, as a run to compare others with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vdcompress import runs
from vdcompress.cache_size import measure_cache
from vdcompress.errors import ModelError
from vdcompress.evaluate import evaluate_windows
from vdcompress.events import OnEvent, Stopwatch, Warned, ignore
from vdcompress.healing import processes
from vdcompress.load import load_tokenizer, moved
from vdcompress.pipeline import text
from vdcompress.pipeline.document import (
    Timed,
    described,
    environment,
    kv_cache,
    peak_memory,
)
from vdcompress.pipeline.healing import course
from vdcompress.pipeline.measure import PROMPT_TOKENS
from vdcompress.pipeline.partials import claim, save_state, saved_state, under_way
from vdcompress.pipeline.scratch_settings import Scratch
from vdcompress.recipe import Recipe
from vdcompress.scratch.architecture import FAMILY
from vdcompress.scratch.folder import write_comparison
from vdcompress.scratch.phases import folders, train_phases

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from vdcompress.heal import Healed


@dataclass(frozen=True)
class Training:
    """A training that is to be done or to be continued.

    Attributes:
        recipe: what is trained, and how.
        output: the run that it becomes; checkpoints are in ``<output>.partial`` until then.
        resume: whether it was begun before.
    """

    recipe: Recipe
    output: Path
    resume: bool = False

    @property
    def partial(self) -> Path:
        """Where checkpoints are kept."""
        return runs.partial_of(self.output)

    @classmethod
    def new(
        cls,
        recipe: Recipe,
        *,
        output: Path | None = None,
        force: bool = False,
        root: Path = runs.ROOT,
    ) -> Training:
        """Plan to train what a recipe describes.

        Args:
            recipe: has a ``scratch`` section.
            output: the folder to write; None takes a new one under ``root``.
            force: replace what is in ``output``, and an interrupted run that would become it.
            root: the folder of all runs.

        Raises:
            RunError: ``output`` is taken, or a run of that name was interrupted.
            VDCompressError: as :meth:`Scratch.of` raises.
        """
        Scratch.of(recipe)
        folder = output or runs.new_run(recipe.name or "model", "scratch", root)
        claim(folder, force=force)
        return cls(recipe, folder)

    @classmethod
    def saved(cls, partial: Path) -> Training:
        """Read what an interrupted training left.

        Raises:
            RunError: it is missing or damaged.
        """
        recipe, _ = saved_state(partial, runs.FROM_SCRATCH)
        return cls(recipe, runs.finished_of(partial), resume=True)


def train_scratch(
    job: Training, *, force: bool = False, device: str = "cpu", on_event: OnEvent = ignore
) -> dict[str, Any]:
    """Train a model from random weights, measure it, and write a run: the command ``train``.

    Perplexity is that of windows at random places of held-out text, as those are that train.

    Args:
        job: from :meth:`Training.new`, or :meth:`Training.saved` to resume.
        force: replace what is in the job's ``output``.
        device: where to train.
        on_event: hears what happens.

    Returns:
        The results, as they are saved in ``results.json``: the trained model's figures are those
        called ``compressed``, ``base`` is the same architecture with values at full width. Nothing
        in a process that is not the main one.

    Raises:
        VDCompressError: as the stages raise.
        KeyboardInterrupt: passed on; the checkpoints stay, and ``Training.saved`` continues.
    """
    on_event = on_event if processes.is_main() else ignore
    timed, start_memory = Timed(on_event), peak_memory()
    scratch = Scratch.of(job.recipe)
    training, validation, measuring = _windows(job.recipe, scratch, timed)
    with Stopwatch(timed).stage("build"):
        model = moved(scratch.model(), device)
    with under_way(job.partial, *folders(job.partial, len(scratch.phases))):
        processes.shared(lambda: save_state(job.partial, runs.FROM_SCRATCH, job.recipe))
        phases = train_phases(
            model,
            training,
            validation,
            scratch.phases,
            checkpoints=job.partial,
            resume=job.resume,
            on_event=timed,
        )
        processes.end()
        if not processes.is_main():
            return {}
        if phases[-1].best_epoch == 0:
            on_event(
                Warned("no epoch was better than the start: the weights are those it began with")
            )
        found = _measured(job, scratch, model, measuring, timed)
        results = described(
            "train",
            {"id": job.recipe.name or "model", "revision": None, "family": FAMILY},
            scratch.plan,
            scratch.counts(),
            run=str(job.output),
            parent=None,
            cost=scratch.cost(),
            **found,
            **_courses(phases),
            seconds=timed.seconds,
            environment=environment(device, start_memory),
        )
        with Stopwatch(timed).stage("write"):
            write_comparison(
                job.output,
                model,
                scratch.plan,
                results=results,
                recipe=job.recipe.dumps(),
                force=force,
            )
    return results


def _windows(recipe: Recipe, scratch: Scratch, on_event: OnEvent) -> tuple[Tensor, Tensor, Tensor]:
    """Return the windows that train, that stop training, and that measure."""

    def read() -> tuple[Tensor, Tensor, Tensor]:
        tokenizer = load_tokenizer(scratch.tokenizer)
        if len(tokenizer) > scratch.architecture.vocab_size:
            raise ModelError(
                f"the tokenizer of {scratch.tokenizer} has {len(tokenizer):,} tokens, the "
                f"embeddings {scratch.architecture.vocab_size:,}",
                "name another tokenizer, or set scratch.vocab_size in a recipe",
            )
        training, validation = text.healing_windows(recipe, tokenizer, on_event)
        return training, validation, text.evaluation_windows(recipe, tokenizer, on_event)

    with Stopwatch(on_event).stage("read text"):
        return processes.shared(read)


def _measured(
    job: Training, scratch: Scratch, model: PreTrainedModel, windows: Tensor, on_event: OnEvent
) -> dict[str, Any]:
    """Return the document's fields about quality and cache."""
    with Stopwatch(on_event).stage("evaluate", len(windows)):
        edges = job.recipe.evaluation.positions
        found = evaluate_windows(model, windows, positions=edges, on_event=on_event).to_json()
    found["perplexity"]["data"] = text.evaluation_data(job.recipe)
    cache = measure_cache(model, windows[0, :PROMPT_TOKENS])
    return found | {"kv_cache": kv_cache(scratch.plan, cache)}


def _courses(phases: tuple[Healed, ...]) -> dict[str, Any]:
    """Return how training went: the last phase, and the one before it if there was one."""
    first = course(phases[0]) if len(phases) > 1 else None
    return {"healing": course(phases[-1]), "first_phase": first}
