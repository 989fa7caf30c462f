"""``evaluate``: measure a run beside its base, on its own text or another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vdcompress import harness
from vdcompress.artifact import Compressed, load_artifact
from vdcompress.events import OnEvent, Stopwatch, ignore
from vdcompress.load import Base
from vdcompress.pipeline import text
from vdcompress.pipeline.document import Timed, document, environment, peak_memory
from vdcompress.pipeline.measure import measure
from vdcompress.pipeline.opening import open_base_of
from vdcompress.pipeline.results import read_recipe
from vdcompress.pipeline.settings import settle


def evaluate_run(
    run: Path,
    overrides: Mapping[str, Any] | None = None,
    *,
    tasks: Sequence[str] = (),
    limit: int | None = None,
    device: str = "cpu",
    on_event: OnEvent = ignore,
) -> dict[str, Any]:
    """Measure a run; nothing is written.

    Args:
        run: a finished run or exported folder.
        overrides: settings in place of the run's own recipe, such as ``evaluation.data``.
        tasks: of lm-evaluation-harness, in place of perplexity.
        limit: examples of each task, None for all.
        device: where to calculate.
        on_event: hears what happens.
    """
    timed = Timed(on_event)
    start_memory = peak_memory()
    with Stopwatch(timed).stage("load"):
        compressed = load_artifact(run, device=device)
        base = open_base_of(compressed, device)
    if tasks:
        with Stopwatch(timed).stage("evaluate"):
            found = _on_tasks(compressed, base, tasks, limit)
        return document(
            "evaluate",
            base,
            compressed.plan,
            run=str(run),
            tasks=found,
            seconds=timed.seconds,
            environment=environment(device, start_memory),
        )
    recipe = settle(read_recipe(run).merged(overrides or {}), base.config, timed)
    tokens = text.evaluation_tokens(recipe, compressed.tokenizer)
    measured = measure(compressed, base, tokens, recipe, timed)
    return document(
        "evaluate",
        base,
        compressed.plan,
        run=str(run),
        **measured.fields(compressed.plan, recipe),
        seconds=timed.seconds,
        environment=environment(device, start_memory),
    )


def _on_tasks(
    compressed: Compressed, base: Base, tasks: Sequence[str], limit: int | None
) -> dict[str, dict[str, dict[str, float]]]:
    """Run tasks of lm-evaluation-harness on both models."""
    models = (base.model, compressed.model)
    before, after = harness.run_tasks(models, compressed.tokenizer, tasks, limit=limit)
    return harness.compared(before, after)
