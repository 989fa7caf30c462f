"""``finetune``: heal a run, beside its base as the teacher, and write the result as a new run."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from vdcompress.artifact import Compressed, load_artifact, write_artifact
from vdcompress.card import model_card
from vdcompress.events import OnEvent, Stopwatch, Warned, ignore
from vdcompress.heal import Healed, heal
from vdcompress.healing import processes
from vdcompress.load import Base
from vdcompress.pipeline import text
from vdcompress.pipeline.document import (
    Timed,
    document,
    environment,
    judged,
    peak_memory,
)
from vdcompress.pipeline.healing_job import Job
from vdcompress.pipeline.measure import Measured, measure
from vdcompress.pipeline.opening import open_base_of
from vdcompress.pipeline.partials import under_way
from vdcompress.pipeline.results import read_recipe, read_results
from vdcompress.pipeline.settings import heal_settings, settle
from vdcompress.plots_healing import pictures
from vdcompress.rounding import round_weights

if TYPE_CHECKING:
    from torch import Tensor

LOGS = "logs"


def finetune_run(
    job: Job, *, force: bool = False, device: str = "cpu", on_event: OnEvent = ignore
) -> dict[str, Any]:
    """Heal a run, or go on with healing it: the command ``finetune``.

    Args:
        job: from :func:`~vdcompress.pipeline.healing_job.new_job`, or :meth:`Job.saved` to resume.
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
    windows = _read(job, compressed, timed)
    before = _before(job, compressed, base, tokens, timed) if processes.is_main() else {}
    with under_way(job.partial, job.partial):
        healed = _heal(job, compressed, base, windows, timed)
        processes.end()
        if not processes.is_main():
            return {}
        if healed.best_epoch == 0:
            start = f"the start (val_ppl={healed.initial_val_ppl:.1f})"
            what = f"no epoch was better than {start}: the weights are as they were"
            on_event(Warned(f"{what}; a lower learning rate or other text may do better"))
        spent = max(timed.seconds["finetune"], round(healed.seconds, 3))  # before a resumption too
        timed.seconds["finetune"] = spent
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
            healing=course(healed),
            gate=judged(job.recipe, measured.quality.ratio),
            seconds=timed.seconds,
            environment=environment(device, start_memory),
        )
        with Stopwatch(timed).stage("write"):
            _write(job, compressed, results, force=force)
    return results


def _read(job: Job, compressed: Compressed, on_event: OnEvent) -> tuple[Tensor, Tensor]:
    """Return the sequences that train and those that decide when to stop, in all processes."""
    with Stopwatch(on_event).stage("read text"):
        return processes.shared(
            lambda: text.healing_windows(job.recipe, compressed.tokenizer, on_event)
        )


def _heal(
    job: Job,
    compressed: Compressed,
    base: Base,
    windows: tuple[Tensor, Tensor],
    on_event: OnEvent,
) -> Healed:
    """Train; the model is changed in place."""
    training, validation = windows
    processes.shared(job.save)
    settings = heal_settings(job.recipe)
    steps = settings.total_steps(len(training))
    with Stopwatch(on_event).stage("finetune", steps):
        return heal(
            compressed.model,
            base.model if job.recipe.heal.distill else None,
            training,
            validation,
            settings,
            checkpoints=job.partial,
            resume=job.resume,
            report_to=job.recipe.heal.report_to,
            on_event=on_event,
        )


def _write(job: Job, compressed: Compressed, results: dict[str, Any], *, force: bool) -> None:
    """Write the run, with its curves, and with what trackers wrote beside the checkpoints."""
    logs = job.partial / LOGS
    write_artifact(
        job.output,
        compressed,
        results=results,
        recipe=job.recipe.dumps(),
        card=model_card(results),
        attached=pictures(results) | ({LOGS: logs} if logs.is_dir() else {}),
        force=force,
    )


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


def course(healed: Healed) -> dict[str, Any]:
    """Return how training went, epoch by epoch, as the document has it."""
    return {
        "best_epoch": healed.best_epoch,
        "initial_val_ppl": healed.initial_val_ppl,
        "seconds": round(healed.seconds, 3),
        "tokens": healed.tokens_seen,
        "epochs": [asdict(epoch) for epoch in healed.history],
        "settings": asdict(healed.settings),
    }
