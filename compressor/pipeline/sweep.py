"""``sweep``: one calibration, many plans, each measured beside the base; resumable."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from vdcompress import plots
from vdcompress.atomic import write
from vdcompress.calibrate import calibrate
from vdcompress.errors import ModelError, PlanError
from vdcompress.events import OnEvent, Progress, Stopwatch, Warned, ignore
from vdcompress.frontier import frontier
from vdcompress.load import BaseConfig, load, load_config
from vdcompress.pipeline import text
from vdcompress.pipeline.document import SCHEMA, Timed, environment, peak_memory
from vdcompress.pipeline.settings import settle
from vdcompress.pipeline.sweep_folder import (
    ROOT,
    RowError,
    SweepFolder,
    weights_digest,
)
from vdcompress.pipeline.sweep_plans import Axes, variants
from vdcompress.pipeline.sweep_rows import (
    DONE,
    FAILED,
    IMPOSSIBLE,
    PLAN,
    REFERENCE,
    REFERENCES,
    Json,
    Listener,
    Row,
    Variant,
    Work,
    all_needs,
    base_bytes,
    blank,
    ended,
    measured,
)
from vdcompress.recipe import Recipe, model_of

if TYPE_CHECKING:
    from torch import Tensor

BASE = "fp16"


@dataclass(frozen=True)
class Sweep:
    """A sweep that is to be done or to be continued.

    Attributes:
        recipe: what all rows have in common, settled.
        config: the base model before its weights are read.
        rows: in the order in which they are measured.
        folder: where they are kept.
    """

    recipe: Recipe
    config: BaseConfig
    rows: tuple[Row, ...]
    folder: SweepFolder


def new_sweep(
    recipe: Recipe,
    axes: Axes,
    *,
    output: Path | None = None,
    root: Path = ROOT,
    on_event: OnEvent = ignore,
) -> Sweep:
    """Plan a sweep from the config alone.

    Args:
        recipe: what all rows have in common.
        axes: what to combine, by the names in :data:`~vdcompress.pipeline.sweep_plans.AXES`.
        output: the folder to write or to continue; None takes the one that belongs to these
            settings under ``root``.
        root: the folder of all sweeps.
        on_event: warned of a length that is cut.

    Raises:
        UsageError: nothing to try, or no combination can be planned.
        RunError: ``output`` holds something else, or a sweep with other settings.
    """
    config = load_config(model_of(recipe), revision=recipe.revision)
    common = settle(recipe, config.config, on_event)
    tried = tuple(Variant.of(varied, config) for varied in variants(recipe, axes))
    if all(variant.problem for variant in tried):
        first = tried[0]
        raise PlanError(
            [f"no combination can be planned: {first.name}: {first.problem}"],
            "see: vdcompress inspect MODEL",
        )
    settings = _settings(common, config)
    folder = SweepFolder(output, settings) if output else SweepFolder.default(settings, root)
    folder.require_usable()
    return Sweep(common, config, (*REFERENCES, *tried), folder)


def run_sweep(sweep: Sweep, *, device: str = "cpu", on_event: OnEvent = ignore) -> Json:
    """Measure every row that is not there yet: the command ``sweep``.

    Args:
        sweep: what :func:`new_sweep` returned.
        device: where to calculate.
        on_event: hears what happens.

    Returns:
        The document that is saved as ``sweep.json``, beside the plot ``sweep.png``: all rows of
        the folder, those of earlier calls too.

    Raises:
        VDCompressError: nothing could be calibrated, or a file could not be written. A row that
            fails is a row with its reason, and is tried again by the next call.
    """
    timed = Timed(on_event)
    start_memory = peak_memory()
    found = {row.name: _kept(sweep.folder, row, timed) for row in sweep.rows}
    pending = [row for row in sweep.rows if found[row.name] is None]
    if any(not _problem(row) for row in pending):
        found |= _measured(sweep, pending, device, timed)
    rows = [found[row.name] or _impossible(row) for row in sweep.rows]
    results = _document(sweep, [*rows, *sweep.folder.others(set(found))])
    results |= {"seconds": timed.seconds, "environment": environment(device, start_memory)}
    if results["plot"]:
        write(sweep.folder.plot, plots.sweep(results))
    write(sweep.folder.document, (json.dumps(results, indent=1) + "\n").encode())
    return results


def require_rows(results: Json) -> None:
    """Say why, if not one plan of a sweep could be measured.

    Raises:
        ModelError: the plans that could be made failed.
        PlanError: none could be made.
    """
    if any(row["state"] == DONE for row in results["rows"]):
        return
    hint = f"the reasons are kept in {results['run']}"
    for row in results["rows"]:
        if row["state"] == FAILED:
            raise ModelError(f"no plan could be measured: {row['row']}: {row['reason']}", hint)
    row = results["rows"][0]
    raise PlanError([f"no combination could be planned: {row['row']}: {row['reason']}"], hint)


def _measured(
    sweep: Sweep, pending: Sequence[Row], device: str, on_event: OnEvent
) -> dict[str, Json]:
    """Calibrate once, then measure and save one row after another."""
    work = _work(sweep, pending, device, on_event)
    done: dict[str, Json] = {}
    told: set[str] = set()
    with Stopwatch(on_event).stage("sweep", len(pending)):
        for number, row in enumerate(pending):
            listener = Listener(on_event, row.name, number, told)
            row_found = _impossible(row) if _problem(row) else measured(row, work, listener)
            sweep.folder.save(row_found)
            done[row.name] = row_found
            on_event(ended(row_found))
            on_event(Progress("sweep", number + 1))
    return done


def _work(sweep: Sweep, pending: Iterable[Row], device: str, on_event: OnEvent) -> Work:
    """Load, read and calibrate; the folder is begun as soon as the text is known."""
    recipe, watch = sweep.recipe, Stopwatch(on_event)
    with watch.stage("load"):
        base = load(model_of(recipe), revision=recipe.revision, device=device)
    base = replace(base, dtype=recipe.dtype or base.dtype)
    with watch.stage("read text"):
        windows = text.calibration_windows(recipe, base.tokenizer)
        tokens = text.evaluation_tokens(recipe, base.tokenizer)
    sweep.folder.begin(_digest(windows.tokens, tokens))
    needs = all_needs(pending, base.shape)
    with watch.stage("calibrate", len(windows.tokens)):
        statistics = calibrate(base, windows.tokens, needs=needs, on_event=on_event)
    return Work(base, recipe, windows, tokens, statistics)


def _kept(folder: SweepFolder, row: Row, on_event: OnEvent) -> Json | None:
    """Return a row that was measured before; one that is damaged is measured again."""
    try:
        return folder.read(row.name, row.settings)
    except RowError as error:
        on_event(Warned(f"{error}; it is measured again"))
        return None


def _problem(row: Row) -> str:
    return row.problem if isinstance(row, Variant) else ""


def _impossible(row: Row) -> Json:
    return blank(row, IMPOSSIBLE, _problem(row))


def _settings(recipe: Recipe, config: BaseConfig) -> Json:
    """Return what all rows have in common."""
    weights = weights_digest(config.folder) if config.revision is None else None
    settled = recipe.model_dump(mode="json", include={"calibration", "evaluation"})
    return {
        "model": {"id": config.id, "revision": config.revision, "weights": weights},
        "dtype": recipe.dtype or config.dtype,
        "text_field": recipe.text_field,
        **settled,
    }


def _document(sweep: Sweep, rows: Sequence[Json]) -> Json:
    """Return all rows, the base, and what nothing beats."""
    config, done = sweep.config, [row for row in rows if row["state"] == DONE]
    measured_by = done[0]["perplexity"] if done else {}
    base = {"bytes_per_token": base_bytes(config.shape), "perplexity": measured_by.get("base")}
    plans = [row for row in done if row["kind"] == PLAN]
    return {
        "schema": SCHEMA,
        "command": "sweep",
        "run": str(sweep.folder.path),
        "model": {"id": config.id, "revision": config.revision, "family": config.shape.family},
        "settings": sweep.folder.settings,
        "base": {"name": BASE} | base,
        "references": [row for row in rows if row["kind"] == REFERENCE],
        "rows": [row for row in rows if row["kind"] == PLAN],
        "frontier": _unbeaten(base, done),
        "plan_frontier": _unbeaten(base, plans),
        "tokens": measured_by.get("tokens"),
        "window": measured_by.get("window"),
        "data": measured_by.get("data"),
        "plot": str(sweep.folder.plot) if done else None,
    }


def _unbeaten(base: Json, rows: Sequence[Json]) -> list[str]:
    """Return the names of the rows, and the base, that none of them beats."""
    points = {
        row["row"]: (row["kv_cache"]["bytes_per_token"], row["perplexity"]["compressed"])
        for row in rows
    }
    if base["perplexity"] is not None:
        points[BASE] = (base["bytes_per_token"], base["perplexity"])
    return list(frontier(points))


def _digest(*tensors: Tensor) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()
