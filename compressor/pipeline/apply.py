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
from vdcompress.load import Base, BaseConfig, load, load_config
from vdcompress.pipeline import text
from vdcompress.pipeline.document import (
    Timed,
    document,
    environment,
    judged,
    peak_memory,
)
from vdcompress.pipeline.measure import measure
from vdcompress.pipeline.planning import Planned, needed, plan_measured, with_shared_hint
from vdcompress.pipeline.rewriting import compressed_model
from vdcompress.pipeline.settings import (
    checked_request,
    plan_of,
    request_of,
    settle,
)
from vdcompress.pipeline.streaming import apply_streaming, exceeds
from vdcompress.plan import Plan
from vdcompress.recipe import Recipe, model_of
from vdcompress.report import model_card
from vdcompress.statistics import Statistics


@dataclass(frozen=True)
class Opened:
    """A loaded base, and what is to become of it.

    Attributes:
        base: the model.
        recipe: settled.
        plan: None where it waits for calibration.
    """

    base: Base
    recipe: Recipe
    plan: Plan | None


@dataclass(frozen=True)
class Calibrated:
    """A base, what calibration measured, and the plan."""

    opened: Opened
    windows: text.Windows
    statistics: Statistics
    planned: Planned


def compress(
    model: str,
    v_dim: int | None = None,
    *,
    k_dim: int | None = None,
    groups: int | None = None,
    v_groups: int | None = None,
    k_groups: int | None = None,
    k_rotary_dim: int | None = None,
    kv_budget: float | None = None,
    allocation: str | None = None,
    v_bits: int | None = None,
    k_bits: int | None = None,
    k_rotary_bits: int | None = None,
    sinks: int | None = None,
    window: int | None = None,
    target: str | None = None,
    recipe: Recipe | None = None,
    overrides: Mapping[str, Any] | None = None,
    device: str = "cpu",
    on_event: OnEvent = ignore,
) -> Compressed:
    """Compress a model's cache: load, calibrate, plan and rewrite in one call.

    Args:
        model: a folder, an alias (``pythia-70m``) or a hub id.
        v_dim: width of V per token and layer, over all its latents.
        k_dim: width of K likewise.
        groups: latents per layer of each side that changes; None is one per key/value head.
        v_groups: the same for V alone.
        k_groups: the same for K alone.
        k_rotary_dim: how much of ``k_dim`` is rotary.
        kv_budget: fraction of the base's bytes per token, in place of widths.
        allocation: ``uniform``, or ``layers`` for widths that differ by layer.
        v_bits: of V's latents, 16, 8, 4, 3 or 2; alone it packs the whole values.
        k_bits: of K's likewise.
        k_rotary_bits: of the rotary part of K; None is ``k_bits``, but at least 8.
        sinks: first tokens of a sequence that stay in 16 bits; None is 4 where anything has fewer
            than 8 bits.
        window: newest tokens that stay in 16 bits; None is 32 there.
        target: ``transformers`` or ``vllm``, what the layout is for.
        recipe: further settings; None takes the defaults.
        overrides: single settings, such as ``{"calibration.data": "text.jsonl"}``.
        device: where to calculate.
        on_event: hears what happens.

    Returns:
        The compressed model and what is needed to save it; nothing is written.

    Raises:
        VDCompressError: any of its kinds, in one line with a hint.
    """
    asked = {
        "v_dim": v_dim,
        "k_dim": k_dim,
        "groups": groups,
        "v_groups": v_groups,
        "k_groups": k_groups,
        "k_rotary_dim": k_rotary_dim,
        "kv_budget": kv_budget,
        "allocation": allocation,
        "v_bits": v_bits,
        "k_bits": k_bits,
        "k_rotary_bits": k_rotary_bits,
        "sinks": sinks,
        "window": window,
        "target": target,
    }
    values = {"model": model, **{f"plan.{name}": value for name, value in asked.items()}}
    merged = (recipe or Recipe()).merged(values | dict(overrides or {}))
    opened = open_base(merged, device, on_event)
    with Stopwatch(on_event).stage("read text"):
        windows = text.calibration_windows(opened.recipe, opened.base.tokenizer)
    return rewritten(calibrated(opened, windows, on_event), on_event)


def apply_recipe(
    recipe: Recipe,
    *,
    output: Path | None = None,
    force: bool = False,
    device: str = "cpu",
    max_memory: int | None = None,
    root: Path = runs.ROOT,
    on_event: OnEvent = ignore,
) -> dict[str, Any]:
    """Compress, measure beside the base, and write the artefact: the command ``apply``.

    Args:
        recipe: what to do.
        output: the folder to write; None takes a new one under ``root``.
        force: replace what is in ``output``.
        device: where to calculate.
        max_memory: bytes; a base whose float32 weights take more is never held whole, but read,
            rewritten and measured layer by layer, as ``pipeline/streaming.py`` says.
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
    if max_memory is not None and exceeds(recipe, max_memory):
        return apply_streaming(
            recipe,
            max_memory=max_memory,
            output=output,
            force=force,
            device=device,
            root=root,
            on_event=on_event,
        )
    timed = Timed(on_event)
    start_memory = peak_memory()
    opened = open_base(recipe, device, timed)
    with Stopwatch(timed).stage("read text"):
        windows = text.calibration_windows(opened.recipe, opened.base.tokenizer)
        tokens = text.evaluation_tokens(opened.recipe, opened.base.tokenizer)
    found = calibrated(opened, windows, timed)
    planned = with_shared_hint(found.planned, opened.base, opened.recipe, found.statistics, timed)
    compressed = rewritten(found, timed)
    measured = measure(compressed, opened.base, tokens, opened.recipe, timed)
    settled = opened.recipe
    folder = output or runs.new_run(model_of(recipe), request_of(settled).label(), root)
    results = document(
        "apply",
        opened.base,
        planned.plan,
        run=str(folder),
        predicted_loss=planned.predicted,
        shared_latent=planned.shared,
        **measured.fields(planned.plan, settled),
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


def preview(recipe: Recipe, *, device: str = "cpu", on_event: OnEvent = ignore) -> dict[str, Any]:
    """Return what :func:`apply_recipe` would do, and write nothing: ``apply --dry-run``.

    The config alone is enough unless the plan needs gains: then the base is loaded and calibrated,
    and the predicted loss is part of the answer.

    Args:
        recipe: what to do.
        device: where to calibrate.
        on_event: hears what happens.
    """
    config = load_config(model_of(recipe), revision=recipe.revision)
    settled = settle(recipe, config.config, on_event)
    if not checked_request(settled, config.shape).needs_gains(config.shape):
        plan = plan_of(settled, config.shape, on_event)
        return _previewed(config, Planned(plan), settled)
    timed = Timed(on_event)
    opened = open_base(settled, device, timed)
    with Stopwatch(timed).stage("read text"):
        windows = text.calibration_windows(opened.recipe, opened.base.tokenizer)
    planned = calibrated(opened, windows, timed).planned
    return _previewed(config, planned, settled) | {"seconds": timed.seconds}


def open_base(recipe: Recipe, device: str, on_event: OnEvent) -> Opened:
    """Settle a recipe from the base's config, then load the weights."""
    config = load_config(model_of(recipe), revision=recipe.revision)
    recipe = settle(recipe, config.config, on_event)
    waits = checked_request(recipe, config.shape).needs_gains(config.shape)
    plan = None if waits else plan_of(recipe, config.shape, on_event)
    with Stopwatch(on_event).stage("load"):
        base = load(model_of(recipe), revision=recipe.revision, device=device)
    return Opened(replace(base, dtype=recipe.dtype or base.dtype), recipe, plan)


def calibrated(opened: Opened, windows: text.Windows, on_event: OnEvent) -> Calibrated:
    """Measure a base, and make the plan if it waited for that."""
    base, recipe = opened.base, opened.recipe
    with Stopwatch(on_event).stage("calibrate", len(windows.tokens)):
        needs = needed(recipe, base.shape, opened.plan)
        statistics = calibrate(base, windows.tokens, needs=needs, on_event=on_event)
    if opened.plan is None:
        planned = plan_measured(base, recipe, statistics, on_event)
    else:
        planned = Planned(opened.plan)
    return Calibrated(opened, windows, statistics, planned)


def rewritten(found: Calibrated, on_event: OnEvent) -> Compressed:
    """Rewrite a base as its plan says."""
    base, plan, tokens = found.opened.base, found.planned.plan, found.windows.tokens
    model = compressed_model(base, plan, found.statistics, tokens, on_event)
    return Compressed.of(base, plan, model, calibration=found.windows.digest)


def _previewed(base: BaseConfig, planned: Planned, settled: Recipe) -> dict[str, Any]:
    return document(
        "apply",
        base,
        planned.plan,
        dry_run=True,
        predicted_loss=planned.predicted,
        recipe=settled.model_dump(mode="json"),
    )
