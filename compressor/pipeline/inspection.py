"""``inspect``: what a model's cache is, or could be; no weight is loaded unless text is given.

Of a run the headers of its weights are read: one that was cut off is not described as whole.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from vdcompress import gains, runs, serving
from vdcompress.artifact import read_marker
from vdcompress.budget import divisors
from vdcompress.calibrate import calibrate
from vdcompress.cost import plan_cost, with_maps
from vdcompress.energy import energies, frequency_shares, latent_energies
from vdcompress.errors import PlanError, RunError
from vdcompress.events import OnEvent, Stopwatch, ignore
from vdcompress.load import Base, BaseConfig, load, load_config
from vdcompress.modeling.layout import LayerLayout
from vdcompress.pipeline.document import SCHEMA, cost
from vdcompress.pipeline.results import read_results
from vdcompress.pipeline.settings import settle
from vdcompress.pipeline.text import calibration_windows
from vdcompress.plan import ModelShape, Plan, make_plan
from vdcompress.recipe import Recipe, model_of
from vdcompress.shards import Checkpoint
from vdcompress.standard_layouts import Standard, standard_layouts
from vdcompress.statistics import Statistics


def inspect_model(target: str, revision: str | None = None) -> dict[str, Any]:
    """Describe a base model (MODEL) or a run or exported folder (RUN).

    Args:
        target: a folder, an alias, a hub id, or a run's name under ``./runs``.
        revision: of a hub id.

    Returns:
        JSON: ``kind`` (``base`` or ``compressed``), cache, layers, cost, engines; for a base the
        widths that V could have, and layouts that most people want.
    """
    for folder in (Path(target), runs.ROOT / target):
        if runs.is_finished(folder):
            return _compressed(folder)
        if folder.suffix == runs.PARTIAL and folder.is_dir():
            runs.resolve(folder)
    return _base(load_config(target, revision=revision))


def inspect_energy(
    recipe: Recipe, *, groups: int | None = None, device: str = "cpu", on_event: OnEvent = ignore
) -> dict[str, Any]:
    """Describe a base model, and calibrate it to say what latents of each width keep.

    Args:
        recipe: names the model; its ``calibration`` section says with which text.
        groups: how many latents are looked at one by one; None is one per key/value head.
        device: where to calculate.
        on_event: hears what happens.

    Returns:
        JSON: :func:`inspect_model`'s, with ``energy`` by layer, side, number of groups and width,
        all latents together (``latent`` null) and each of ``groups``; ``frequencies``, the share
        of K's rotary energy in each; and ``calibration``.

    Raises:
        PlanError: heads do not divide into so many groups.
    """
    config = load_config(model_of(recipe), revision=recipe.revision)
    heads = config.shape.kv_heads
    count = heads if groups is None else groups
    if count < 1 or heads % count:
        tries = ", ".join(map(str, divisors(heads)))
        raise PlanError([f"groups {count} does not divide {heads} key/value heads"], f"try {tries}")
    settled = settle(recipe, config.config, on_event)
    base, statistics = _measured(settled, device, on_event)
    with Stopwatch(on_event).stage("energy"):
        found = gains.gains(base.shape, statistics)
        alone = gains.latent_gains(base.shape, statistics, count)
    rows = (*energies(found), *latent_energies(alone))
    return _base(base) | {
        "energy": [energy.to_json() for energy in rows],
        "frequencies": [list(shares) for shares in frequency_shares(found)],
        "calibration": settled.calibration.model_dump(mode="json"),
    }


def _measured(recipe: Recipe, device: str, on_event: OnEvent) -> tuple[Base, Statistics]:
    """Load and calibrate a base for gains."""
    watch = Stopwatch(on_event)
    with watch.stage("load"):
        base = load(model_of(recipe), revision=recipe.revision, device=device)
    with watch.stage("read text"):
        windows = calibration_windows(recipe, base.tokenizer)
    with watch.stage("calibrate", len(windows.tokens)):
        statistics = calibrate(base, windows.tokens, needs=gains.NEEDS, on_event=on_event)
    return base, statistics


def _compressed(folder: Path) -> dict[str, Any]:
    plan = Plan.from_json(read_marker(folder)["plan"])
    Checkpoint(folder)  # raises where its files lack what their headers name
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
        "cost": cost(plan),
        "serving": serving.to_json(serving.verdicts(plan.layers)),
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
        "layouts": [_layout(standard, shape) for standard in standard_layouts(shape)],
        "serving": None,
        "tokens_per_gib": _capacity(full.layers),
        "energy": None,
    }


def _layout(standard: Standard, shape: ModelShape) -> dict[str, Any]:
    """Describe one layout for all layers: size, cost with both kinds of maps, engines."""
    layers = (standard.layer,) * shape.layers
    plan = Plan(shape, layers)
    folded = Plan(shape, tuple(with_maps(layer, "folded") for layer in layers))
    per_head = Plan(shape, tuple(with_maps(layer, "per_head") for layer in layers))
    return {
        "options": standard.options,
        "k_groups": standard.layer.k_groups,
        "k_head_dim": standard.layer.k_head_dim,
        "v_groups": standard.layer.v_groups,
        "v_head_dim": standard.layer.v_head_dim,
        **_cache(plan),
        "folded": plan_cost(folded).to_json(),
        "per_head": plan_cost(per_head).to_json(),
        "serving": serving.to_json(serving.verdicts(layers)),
        "tokens_per_gib": _capacity(layers),
    }


def _cache(plan: Plan) -> dict[str, Any]:
    return {
        "base_bytes_per_token": plan.base_bytes_per_token,
        "bytes_per_token": plan.bytes_per_token,
        "reduction": plan.reduction,
    }


def _capacity(layers: tuple[LayerLayout, ...]) -> dict[str, int]:
    return {str(ranks): serving.tokens_per_gib(layers, ranks) for ranks in serving.RANKS}
