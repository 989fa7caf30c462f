"""``compare``: runs side by side, from what their folders say about themselves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vdcompress import runs
from vdcompress.artifact import read_marker
from vdcompress.errors import UsageError
from vdcompress.events import OnEvent, Warned, ignore
from vdcompress.pipeline.document import SCHEMA, kv_cache
from vdcompress.pipeline.results import RESULTS, read_results
from vdcompress.plan import Plan

SAME_BASE = 1e-3  # by how much the base's perplexity may differ on one text, between machines
MEASURED_ON = {"data": "text", "tokens": "tokens", "window": "tokens in a window"}

Json = dict[str, Any]


def compare_runs(folders: Sequence[Path], *, on_event: OnEvent = ignore) -> Json:
    """Put runs side by side; nothing is measured.

    Args:
        folders: finished runs or exported folders, each counted once.
        on_event: warned of figures that cannot be compared.

    Returns:
        The document of ``compare``: one entry of ``runs`` for each, in their order.

    Raises:
        UsageError: there are none.
        RunError: a folder is no run, or is damaged.
    """
    distinct = list({folder.resolve(): folder for folder in folders}.values())
    if not distinct:
        raise UsageError("nothing to compare", "name two runs or more")
    names = labels(distinct)
    found = [_entry(folder, names[folder]) for folder in distinct]
    warnings = differences(found)
    for warning in warnings:
        on_event(Warned(warning))
    return {"schema": SCHEMA, "command": "compare", "runs": found, "warnings": warnings}


def labels(folders: Sequence[Path]) -> dict[Path, str]:
    """Return for each folder the shortest name that no other has: without times, its own, or all.

    ``runs/pythia-70m-v320-20260131-142210-healed-20260131-150000`` is ``pythia-70m-v320-healed``,
    with its last time behind it where two are alike.
    """
    forms = [
        (runs.bare(path), runs.timed(path), path.resolve().name, str(path)) for path in folders
    ]
    taken = [Counter(names) for names in zip(*forms, strict=True)]
    return {
        path: next((n for n, others in zip(names, taken, strict=True) if others[n] == 1), names[-1])
        for path, names in zip(folders, forms, strict=True)
    }


def differences(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return why figures of these entries cannot be compared; nothing if they can."""
    warnings = []
    if len({_base(entry) for entry in found}) > 1:
        warnings.append("the runs are of different models: compare changes, not perplexities")
    measured = [entry["perplexity"] for entry in found if entry["perplexity"] is not None]
    for key, what in MEASURED_ON.items():
        values = list(dict.fromkeys(perplexity.get(key) for perplexity in measured))
        if len(values) > 1:
            listed = ", ".join(f"{v:,}" if isinstance(v, int) else str(v) for v in values)
            warnings.append(f"the runs were not measured alike, {what}: {listed}")
    return warnings or _drifted(measured)


def _drifted(measured: Sequence[Mapping[str, Any]]) -> list[str]:
    """Say so if the base itself is not the same in all: then the text is not either."""
    found = [base for perplexity in measured if (base := perplexity.get("base")) is not None]
    if not found or max(found) <= min(found) * (1 + SAME_BASE):
        return []
    return [
        f"the base's own perplexity differs between the runs, {min(found):.2f} to "
        f"{max(found):.2f}: the text changed, or a part of it was kept for training"
    ]


def _base(entry: Mapping[str, Any]) -> tuple[Any, ...]:
    return entry["model"]["id"], entry["model"]["revision"]


def _entry(folder: Path, name: str) -> Json:
    """Return one run's figures; those that it lacks are null."""
    marker = read_marker(folder)
    plan = Plan.from_json(marker["plan"])
    results = read_results(folder) if (folder / RESULTS).exists() else {}
    healing, seconds = results.get("healing"), results.get("seconds")
    return {
        "run": str(folder),
        "name": name,
        "command": results.get("command"),
        "parent": results.get("parent"),
        "model": marker["base"] | {"family": plan.shape.family},
        "plan": _widths(plan),
        "parameters": results.get("parameters"),
        "kv_cache": results.get("kv_cache") or kv_cache(plan),
        "perplexity": results.get("perplexity"),
        "positions": results.get("positions"),
        "healing": healing and _healing(healing),
        "gate": results.get("gate"),
        "seconds": round(sum(seconds.values()), 3) if seconds else None,
    }


def _widths(plan: Plan) -> Json:
    """Return the plan's scalars, null where layers differ."""
    found = plan.to_json()
    return {key: found[key] for key in ("v_dim", "k_dim", "v_groups", "k_groups")}


def _healing(healing: Mapping[str, Any]) -> Json:
    """Return the course of a finetune: validation perplexity by epoch, the start first."""
    curve = [healing["initial_val_ppl"], *(epoch["val_ppl"] for epoch in healing["epochs"])]
    return {
        "epochs": len(healing["epochs"]),
        "best_epoch": healing["best_epoch"],
        "tokens": healing["tokens"],
        "seconds": healing["seconds"],
        "validation": curve,
    }
