"""Turn a base model into a compressed one: new weights for V, everything else shared."""

from __future__ import annotations

from dataclasses import asdict

import torch
from torch import Tensor
from transformers import PreTrainedModel

from vdcompress import initializers
from vdcompress.errors import PlanError
from vdcompress.events import OnEvent, Progress, ignore
from vdcompress.families.base import AttentionWeights, Projection
from vdcompress.initializers.base import ValueProblem, ValueWeights, fold, keep_everything
from vdcompress.initializers.refit import refit
from vdcompress.load import Base, moved
from vdcompress.modeling.layout import LayerLayout
from vdcompress.plan import ModelShape, Plan, Start
from vdcompress.statistics import Statistics


def rewrite(
    base: Base, plan: Plan, statistics: Statistics, *, on_event: OnEvent = ignore
) -> PreTrainedModel:
    """Return the compressed model that ``plan`` describes.

    The new weights are solved in float64, rounded to the base's storage dtype and kept in the
    model's, so what is evaluated is what will be saved. Parameters that compression does not touch
    share their memory with the base.

    Raises:
        PlanError: for a plan of another shape, or parts that no initialiser finds yet.
    """
    _require_supported(base, plan)
    prefixes = tuple(base.family.parameter_prefix(layer) for layer in range(plan.shape.layers))
    state = {
        name: tensor
        for name, tensor in base.model.state_dict().items()
        if not name.startswith(prefixes)
    }
    attentions = base.family.attention_modules(base.model)
    for index, (attention, layout) in enumerate(zip(attentions, plan.layers, strict=True)):
        weights = base.family.weights(attention)
        solved = solve_values(weights, layout, plan, statistics, index)
        state |= _attention_state(prefixes[index], base, weights, solved)
        on_event(Progress("rewrite", index + 1))
    model = base.family.compressed_on_meta(base.config, plan)
    model.load_state_dict(state, strict=True, assign=True)
    moved(model, next(base.model.parameters()).device)
    model.tie_weights()
    model.config.dtype = getattr(torch, base.dtype)
    return model.eval()


def needed_statistics(start: Start | Plan, shape: ModelShape | None = None) -> frozenset[str]:  # noqa: ARG001
    """Return which moments :func:`rewrite` will read, whatever the widths."""
    start = start.start if isinstance(start, Plan) else start
    needs = initializers.get(start.initializer).needs
    return needs if start.refit == "none" else needs | {"outputs"}


def solve_values(
    weights: AttentionWeights, layout: LayerLayout, plan: Plan, statistics: Statistics, layer: int
) -> ValueWeights:
    """Solve one layer's V path in float64."""
    heads, groups = plan.shape.heads, plan.shape.kv_heads
    o_weight = weights.o.weight.double()
    problem = ValueProblem(
        v_weight=weights.v.weight.double().unflatten(0, (groups, -1)),
        v_bias=_bias(weights.v).unflatten(0, (groups, -1)),
        o_weight=o_weight.unflatten(1, (heads, -1)).permute(1, 0, 2),
        o_bias=_bias(weights.o),
        width=layout.v.width,
        statistics=statistics.layers[layer],
        generator=torch.Generator().manual_seed(plan.start.seed * 100_003 + layer),
    )
    if layout.v.width == plan.shape.head_dim:
        return fold(problem, keep_everything(problem))
    latents = initializers.get(plan.start.initializer).solve(problem)
    if plan.start.refit == "none":
        return fold(problem, latents)
    return refit(problem, latents, plan.start.alternate)


def _attention_state(
    prefix: str, base: Base, weights: AttentionWeights, solved: ValueWeights
) -> dict[str, Tensor]:
    """Name one layer's new parameters, in the base's dtypes."""
    storage, working = getattr(torch, base.dtype), weights.v.weight.dtype
    state = {
        "q_proj.weight": weights.q.weight,
        "q_proj.bias": weights.q.bias,
        "k_proj.weight": weights.k.weight,
        "k_proj.bias": weights.k.bias,
    }
    names = {
        "v_weight": "v_compress.weight",
        "v_bias": "v_compress.bias",
        "o_weight": f"{base.family.output_name}.weight",
        "o_bias": f"{base.family.output_name}.bias",
    }
    for field, tensor in asdict(solved).items():
        state[names[field]] = tensor.to(storage).to(working)
    return {
        prefix + name: tensor.contiguous() for name, tensor in state.items() if tensor is not None
    }


def _require_supported(base: Base, plan: Plan) -> None:
    found = []
    if plan.shape != base.shape:
        found.append(f"the plan is for {plan.shape}, the model is {base.shape}")
    full = plan.shape.full_layout()
    for index, layer in enumerate(plan.layers):
        if layer.v.groups != plan.shape.kv_heads or layer.v.maps != "folded":
            found.append(f"layer {index}: no initializer finds V latents shared by heads yet")
        if (layer.k_nope, layer.k_rotary) != (full.k_nope, full.k_rotary):
            found.append(f"layer {index}: no initializer compresses K yet")
        if layer.v.bits != 16:
            found.append(f"layer {index}: no quantiser packs V yet")
    if found:
        raise PlanError(found, "use make_plan(shape, v_dim=...)")


def _bias(projection: Projection) -> Tensor:
    if projection.bias is None:
        return projection.weight.new_zeros(projection.weight.shape[0], dtype=torch.float64)
    return projection.bias.double()
