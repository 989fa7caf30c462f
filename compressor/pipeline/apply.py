"""``apply``: load, calibrate, plan, rewrite, evaluate, write; and ``compress`` in Python."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vdcompress import runs
from vdcompress.artifact import Compressed, require_free, write_artifact
from vdcompress.calibrate import calibrate
from vdcompress.events import OnEvent, Stopwatch, ignore
from vdcompress.load import Base, load, load_config
from vdcompress.pipeline import text
from vdcompress.pipeline.document import (
    Timed,
    document,
    environment,
    judged,
    peak_memory,
)
from vdcompress.pipeline.measure import measure
from vdcompress.pipeline.settings import plan_of, settle
from vdcompress.plan import Plan
from vdcompress.recipe import Recipe, model_of
from vdcompress.report import model_card
from vdcompress.rewrite import needed_statistics, rewrite


@dataclass(frozen=True)
class Opened:
    """A loaded base, and what is to become of it: the settled recipe and its plan."""

    base: Base
    recipe: Recipe
    plan: Plan


def compress(
    model: str,
    v_dim: int = 320,
    *,
    recipe: Recipe | None = None,
    overrides: Mapping[str, Any] | None = None,
    device: str = "cpu",
    on_event: OnEvent = ignore,
) -> Compressed:
    """Compress a model's V: load, calibrate, plan and rewrite in one call.

    Args:
        model: a folder, an alias (``pythia-70m``) or a hub id.
        v_dim: width of V per token and layer, over all key/value heads.
        recipe: further settings; None takes the defaults.
        overrides: single settings, such as ``{"calibration.data": "text.jsonl"}``.
        device: where to calculate.
        on_event: hears what happens.

    Returns:
        The compressed model and what is needed to save it; nothing is written.

    Raises:
        VDCompressError: any of its kinds, in one line with a hint.
    """
    values = {"model": model, "plan.v_dim": v_dim, **(overrides or {})}
    opened = open_base((recipe or Recipe()).merged(values), device, on_event)
    with Stopwatch(on_event).stage("read text"):
        windows = text.calibration_windows(opened.recipe, opened.base.tokenizer)
    return rewritten(opened, windows, on_event)


def apply_recipe(
    recipe: Recipe,
    *,
    output: Path | None = None,
    force: bool = False,
    device: str = "cpu",
    root: Path = runs.ROOT,
    on_event: OnEvent = ignore,
) -> dict[str, Any]:
    """Compress, measure beside the base, and write the artefact: the command ``apply``.

    Args:
        recipe: what to do.
        output: the folder to write; None takes a new one under ``root``.
        force: replace what is in ``output``.
        device: where to calculate.
        root: the folder of all runs.
        on_event: hears what happens.

    Returns:
        The results, as they are saved in ``results.json``; a quality gate that was missed is
        marked in ``gate``, and :func:`~vdcompress.pipeline.document.require_gate` raises for it.

    Raises:
        VDCompressError: nothing is written then.
    """
    if output is not None:
        require_free(output, force=force)
    timed = Timed(on_event)
    start_memory = peak_memory()
    opened = open_base(recipe, device, timed)
    with Stopwatch(timed).stage("read text"):
        windows = text.calibration_windows(opened.recipe, opened.base.tokenizer)
        tokens = text.evaluation_tokens(opened.recipe, opened.base.tokenizer)
    compressed = rewritten(opened, windows, timed)
    measured = measure(compressed, opened.base, tokens, opened.recipe, timed)
    plan, settled = opened.plan, opened.recipe
    folder = output or runs.new_run(model_of(recipe), f"v{recipe.plan.v_dim}", root)
    results = document(
        "apply",
        opened.base,
        plan,
        run=str(folder),
        **measured.fields(plan, settled),
        gate=judged(settled, measured.quality.ratio),
        seconds=timed.seconds,
        environment=environment(device, start_memory),
    )
    with Stopwatch(timed).stage("write"):
        write_artifact(
            folder,
            compressed,
            results=results,
            recipe=settled.dumps(),
            card=model_card(results),
            force=force,
        )
    return results


def preview(recipe: Recipe, *, on_event: OnEvent = ignore) -> dict[str, Any]:
    """Return what :func:`apply_recipe` would do, from the config alone: ``apply --dry-run``."""
    base = load_config(model_of(recipe), revision=recipe.revision)
    settled = settle(recipe, base.config, on_event)
    plan = plan_of(settled, base.shape, on_event)
    return document("apply", base, plan, dry_run=True, recipe=settled.model_dump(mode="json"))


def open_base(recipe: Recipe, device: str, on_event: OnEvent) -> Opened:
    """Settle a recipe from the base's config, then load the weights."""
    config = load_config(model_of(recipe), revision=recipe.revision)
    recipe = settle(recipe, config.config, on_event)
    plan = plan_of(recipe, config.shape, on_event)
    with Stopwatch(on_event).stage("load"):
        base = load(model_of(recipe), revision=recipe.revision, device=device)
    return Opened(replace(base, dtype=recipe.dtype or base.dtype), recipe, plan)


def rewritten(opened: Opened, windows: text.Windows, on_event: OnEvent) -> Compressed:
    """Calibrate and rewrite a base as its plan says."""
    base, plan = opened.base, opened.plan
    watch = Stopwatch(on_event)
    with watch.stage("calibrate", len(windows.tokens)):
        needs = needed_statistics(plan)
        statistics = calibrate(base, windows.tokens, needs=needs, on_event=on_event)
    with watch.stage("rewrite", plan.shape.layers):
        model = rewrite(base, plan, statistics, on_event=on_event)
    return Compressed.of(base, plan, model, calibration=windows.digest)
