"""``inspect``: what a model's cache is, or could be, without loading a weight."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from vdcompress import runs, serving
from vdcompress.artifact import read_marker
from vdcompress.errors import RunError
from vdcompress.load import BaseConfig, load_config
from vdcompress.modeling.layout import LayerLayout
from vdcompress.pipeline.document import SCHEMA
from vdcompress.pipeline.results import read_results
from vdcompress.plan import Plan, make_plan


def inspect_model(target: str, revision: str | None = None) -> dict[str, Any]:
    """Describe a base model (MODEL) or a run or exported folder (RUN).

    Args:
        target: a folder, an alias, a hub id, or a run's name under ``./runs``.
        revision: of a hub id.

    Returns:
        JSON: ``kind`` (``base`` or ``compressed``), cache, layers, engines; for a base the widths
        that V could have.
    """
    for folder in (Path(target), runs.ROOT / target):
        if runs.is_finished(folder):
            return _compressed(folder)
        if folder.suffix == runs.PARTIAL and folder.is_dir():
            runs.resolve(folder)
    return _base(load_config(target, revision=revision))


def _compressed(folder: Path) -> dict[str, Any]:
    plan = Plan.from_json(read_marker(folder)["plan"])
    try:
        results = read_results(folder)
    except RunError:
        results = {}
    return {
        "schema": SCHEMA,
        "command": "inspect",
        "kind": "compressed",
        "run": str(folder),
        "model": results.get("model"),
        "plan": plan.to_json(),
        "parameters": results.get("parameters"),
        "kv_cache": results.get("kv_cache") or _cache(plan),
        "perplexity": results.get("perplexity"),
        "positions": results.get("positions"),
        "gate": results.get("gate"),
        "serving": [asdict(verdict) for verdict in serving.verdicts(plan.layers)],
        "tokens_per_gib": _capacity(plan.layers),
    }


def _base(base: BaseConfig) -> dict[str, Any]:
    shape = base.shape
    full = make_plan(shape, v_dim=shape.kv_dim)
    step = 8 * shape.kv_heads
    widths = [make_plan(shape, v_dim=width) for width in range(step, shape.kv_dim + 1, step)]
    return {
        "schema": SCHEMA,
        "command": "inspect",
        "kind": "base",
        "model": {"id": base.id, "revision": base.revision, "family": shape.family},
        "shape": asdict(shape),
        "dtype": base.dtype,
        "max_positions": getattr(base.config, "max_position_embeddings", None),
        "plan": full.to_json(),
        "kv_cache": _cache(full),
        "widths": [
            {"v_dim": plan.layers[0].v_dim, "v_head_dim": plan.layers[0].v_head_dim, **_cache(plan)}
            for plan in reversed(widths)
        ],
        "serving": None,
        "tokens_per_gib": _capacity(full.layers),
    }


def _cache(plan: Plan) -> dict[str, Any]:
    return {
        "base_bytes_per_token": plan.base_bytes_per_token,
        "bytes_per_token": plan.bytes_per_token,
        "reduction": plan.reduction,
    }


def _capacity(layers: tuple[LayerLayout, ...]) -> dict[str, int]:
    return {str(ranks): serving.tokens_per_gib(layers, ranks) for ranks in serving.RANKS}
