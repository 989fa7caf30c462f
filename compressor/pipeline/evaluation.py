"""``evaluate``: measure a run beside its base, on its own text or another."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vdcompress.artifact import load_artifact
from vdcompress.events import OnEvent, Stopwatch, ignore
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
    device: str = "cpu",
    on_event: OnEvent = ignore,
) -> dict[str, Any]:
    """Measure a run; nothing is written.

    Args:
        run: a finished run or exported folder.
        overrides: settings in place of the run's own recipe, such as ``evaluation.data``.
        device: where to calculate.
        on_event: hears what happens.
    """
    timed = Timed(on_event)
    start_memory = peak_memory()
    with Stopwatch(timed).stage("load"):
        compressed = load_artifact(run, device=device)
        base = open_base_of(compressed, device)
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
