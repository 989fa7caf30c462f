"""Turn a base model into a compressed one: new attention weights, everything else shared."""

from __future__ import annotations

from dataclasses import asdict

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vdcompress import initializers
from vdcompress.calibrate import PULLS
from vdcompress.errors import PlanError
from vdcompress.events import OnEvent, Progress, ignore
from vdcompress.families.base import AttentionWeights, Projection
from vdcompress.latents.keys import (
    KeyProblem,
    KeyWeights,
    keep_centred_keys,
    keep_keys,
    keep_keys_behind_rope,
    solve_keys,
)
from vdcompress.latents.refit import refit
from vdcompress.latents.rotation import rotates, turn_keys, turn_values
from vdcompress.latents.rounding_basis import key_basis, value_basis
from vdcompress.latents.values import (
    ValueProblem,
    ValueWeights,
    fold,
    keep_centred,
    keep_everything,
    map_per_head,
)
from vdcompress.load import Base, BaseConfig, moved
from vdcompress.plan import ModelShape, Plan, Start
from vdcompress.statistics import LayerStatistics, Statistics

NAMES = {
    "q_weight": "q_proj.weight",
    "q_bias": "q_proj.bias",
    "k_weight": "k_proj.weight",
    "k_bias": "k_proj.bias",
    "q_expand": "q_expand.weight",
    "k_compress": "k_compress.weight",
    "k_shift": "k_compress.bias",
    "o_contract": "o_contract.weight",
    "v_weight": "v_compress.weight",
    "v_bias": "v_compress.bias",
}


def rewrite(
    base: Base, plan: Plan, statistics: Statistics, *, on_event: OnEvent = ignore
) -> PreTrainedModel:
    """Return the compressed model that ``plan`` describes.

    The new weights are solved in float64, rounded to the base's storage dtype and kept in the
    model's, so what is evaluated is what will be saved. Parameters that compression does not touch
    share their memory with the base.

    Raises:
        PlanError: for a plan of another shape, or parts that nothing runs yet.
    """
    require_supported(base.shape, plan)
    prefixes = tuple(base.family.parameter_prefix(layer) for layer in range(plan.shape.layers))
    state = {
        name: tensor
        for name, tensor in base.model.state_dict().items()
        if not name.startswith(prefixes)
    }
    for index, attention in enumerate(base.family.attention_modules(base.model)):
        weights = base.family.weights(attention)
        state |= layer_state(base, plan, index, weights, statistics.layers[index])
        on_event(Progress("rewrite", index + 1))
    model = base.family.compressed_on_meta(base.config, plan)
    model.load_state_dict(state, strict=True, assign=True)
    moved(model, next(base.model.parameters()).device)
    model.tie_weights()
    model.config.dtype = getattr(torch, base.dtype)
    return model.eval()


def needed_statistics(start: Start, shape: ModelShape, plan: Plan | None = None) -> frozenset[str]:
    """Return which statistics :func:`rewrite` will read.

    Args:
        start: how the new weights are found.
        shape: of the base.
        plan: what the cache keeps; None asks for what any plan may read.
    """
    initializer = initializers.get(start.initializer)
    layers = plan.layers if plan is not None else ()
    narrower = [layer.v_groups for layer in layers if layer.v_dim < shape.kv_dim]
    needs: frozenset[str] = frozenset()
    if plan is None or shape.kv_heads in narrower:
        needs = initializer.needs if start.refit == "none" else initializer.needs | {"outputs"}
    if plan is None or any(groups < shape.kv_heads for groups in narrower):
        shared = initializer.shared_needs
        needs = needs | (initializer.needs if shared is None else shared)
    if any(layer.v.packed for layer in layers):
        needs = needs | {"values"}
    if any(layer.k_nope.packed or layer.k_rotary.packed for layer in layers):
        needs = needs | {"keys"} | initializer.key_needs
    if any(layer.k_nope.after_rope for layer in layers):
        needs = needs | {"keys"}
    if plan is None or any(not _keeps_keys(shape, plan, index) for index in range(shape.layers)):
        needs = needs | initializer.key_needs
        own = plan is None or any(layer.k_groups == shape.kv_heads for layer in plan.layers)
        if start.alternate and own:
            needs = needs | {PULLS}
    return needs


def layer_state(
    base: BaseConfig,
    plan: Plan,
    index: int,
    weights: AttentionWeights,
    statistics: LayerStatistics,
) -> dict[str, Tensor]:
    """Solve one layer and name its attention's new parameters, in the base's dtypes.

    Args:
        base: its family names the parameters; its dtype is what they are rounded to.
        plan: what every layer keeps.
        index: of the layer.
        weights: the base's projections.
        statistics: the layer's own.
    """
    solved = asdict(solve_keys_of(weights, plan, index, statistics))
    solved |= asdict(solve_values_of(weights, plan, index, statistics))
    output = base.family.output_name
    names = NAMES | {"o_weight": f"{output}.weight", "o_bias": f"{output}.bias"}
    biased = base.family.compressed_bias(base.config, plan)
    storage, working = getattr(torch, base.dtype), weights.v.weight.dtype
    prefix = base.family.parameter_prefix(index)
    return {
        prefix + names[field]: tensor.to(storage).to(working).contiguous()
        for field, tensor in solved.items()
        if tensor is not None and biased.get(field.removesuffix("_bias"), True)
    }


def solve_values_of(
    weights: AttentionWeights, plan: Plan, index: int, statistics: LayerStatistics
) -> ValueWeights:
    """Solve one layer's V path in float64."""
    part, heads = plan.layers[index].v, plan.shape.heads
    problem = ValueProblem(
        v_weight=weights.v.weight.double().unflatten(0, (part.groups, -1)),
        v_bias=_bias(weights.v).unflatten(0, (part.groups, -1)),
        o_weight=weights.o.weight.double().unflatten(1, (heads, -1)).permute(1, 0, 2),
        o_bias=_bias(weights.o),
        width=part.width,
        statistics=statistics,
        generator=_generator(plan, index),
    )
    solved = _solved_values(problem, plan, index)
    if rotates(part, plan.start.rotate):
        return turn_values(solved, part, value_basis(problem, solved, _generator(plan, index)))
    return solved


def _solved_values(problem: ValueProblem, plan: Plan, index: int) -> ValueWeights:
    part = plan.layers[index].v
    combine = map_per_head if part.maps == "per_head" else fold
    if part.width == problem.v_weight.shape[1]:
        kept = keep_centred if part.packed else keep_everything
        return combine(problem, kept(problem))
    latents = initializers.get(plan.start.initializer).solve(problem)
    if part.maps == "per_head":
        return map_per_head(problem, latents)
    if plan.start.refit == "none" or problem.joined > 1:
        return fold(problem, latents)
    return refit(problem, latents, plan.start.alternate)


def solve_keys_of(
    weights: AttentionWeights, plan: Plan, index: int, statistics: LayerStatistics
) -> KeyWeights:
    """Solve one layer's K path in float64."""
    shape = plan.shape
    problem = KeyProblem(
        q_weight=weights.q.weight.double().unflatten(0, (shape.heads, -1)),
        q_bias=_bias(weights.q).unflatten(0, (shape.heads, -1)),
        k_weight=weights.k.weight.double().unflatten(0, (shape.kv_heads, -1)),
        k_bias=_bias(weights.k).unflatten(0, (shape.kv_heads, -1)),
        rotary_dim=shape.rotary_dim,
        layout=plan.layers[index],
        statistics=statistics,
        generator=_generator(plan, index),
    )
    solved, layout = _solved_keys(problem, plan, index), problem.layout
    wanted = plan.start.rotate
    if rotates(layout.k_nope, wanted) or rotates(layout.k_rotary, wanted):
        metric = initializers.get(plan.start.initializer).keys(problem)
        basis = key_basis(problem, metric, solved, _generator(plan, index), wanted)
        return turn_keys(solved, layout, basis)
    return solved


def _solved_keys(problem: KeyProblem, plan: Plan, index: int) -> KeyWeights:
    if not _keeps_keys(plan.shape, plan, index):
        metric = initializers.get(plan.start.initializer).keys(problem)
        return solve_keys(problem, metric, plan.start.alternate)
    if problem.layout.k_nope.after_rope:
        return keep_keys_behind_rope(problem)
    return keep_centred_keys(problem) if problem.layout.k_nope.packed else keep_keys(problem)


def require_supported(shape: ModelShape, plan: Plan) -> None:
    """Raise :class:`PlanError` unless a plan is of this shape and can be solved."""
    found = []
    if plan.shape != shape:
        found.append(f"the plan is for {plan.shape}, the model is {shape}")
    if found:
        raise PlanError(found, "use make_plan(shape, v_dim=..., k_dim=...)")


def _keeps_keys(shape: ModelShape, plan: Plan, index: int) -> bool:
    """Say whether the K latents of a layer are the base's keys, rotated at most."""
    full, layer = shape.full_layout(), plan.layers[index]
    if layer.k_nope.after_rope:
        return layer.k_groups == shape.kv_heads and layer.k_head_dim == shape.head_dim
    kept = ((part.groups, part.width, part.maps) for part in (layer.k_nope, layer.k_rotary))
    whole = ((part.groups, part.width, part.maps) for part in (full.k_nope, full.k_rotary))
    same = layer.k_rotary.frequencies == full.k_rotary.frequencies
    return same and list(kept) == list(whole)


def _generator(plan: Plan, index: int) -> torch.Generator:
    return torch.Generator().manual_seed(plan.start.seed * 100_003 + index)


def _bias(projection: Projection) -> Tensor:
    if projection.bias is None:
        return projection.weight.new_zeros(projection.weight.shape[0], dtype=torch.float64)
    return projection.bias.double()
