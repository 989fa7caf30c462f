"""Fold maps per head into the projections beside them, for engines that cut and fuse those.

A map ``q_expand`` [h, d, k] stands behind the query's projection, ``o_contract`` [h, v, d] before
the output's. Where nothing stands between them their product is one projection, which takes more
arithmetic for each new token and none for the cache. Keys that are mapped behind RoPE keep theirs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vdcompress import families
from vdcompress.artifact import Compressed
from vdcompress.cost import with_maps
from vdcompress.modeling.layout import LayerLayout
from vdcompress.plan import Plan


def folded_plan(plan: Plan) -> Plan:
    """Return a plan whose maps are folded wherever they can be."""
    return replace(plan, layers=tuple(with_maps(layer, "folded") for layer in plan.layers))


def folded(compressed: Compressed) -> Compressed:
    """Return the same model with its maps folded, itself if there is nothing to fold.

    Products are taken in float64 and rounded to the storage dtype, so logits move by its rounding.
    Parameters that folding does not touch share their memory.
    """
    plan = folded_plan(compressed.plan)
    if plan == compressed.plan:
        return compressed
    state = dict(compressed.model.state_dict())
    family = families.get(plan.shape.family)
    storage = getattr(torch, compressed.dtype)
    pairs = zip(compressed.plan.layers, plan.layers, strict=True)
    for index, (old, new) in enumerate(pairs):
        prefix = family.parameter_prefix(index)
        products = _products(state, prefix, f"{family.output_name}.weight", old, new)
        state |= {name: w.to(storage).to(torch.float32) for name, w in products.items()}
    return replace(compressed, plan=plan, model=_rebuilt(compressed.model, plan, state))


def _products(
    state: dict[str, Tensor], prefix: str, output: str, old: LayerLayout, new: LayerLayout
) -> dict[str, Tensor]:
    """Take a layer's folded maps out of ``state`` and return the projections that replace them."""
    found = {}
    if old.k_maps != new.k_maps:
        expand = state.pop(f"{prefix}q_expand.weight").double()
        for name in (f"{prefix}q_proj.weight", f"{prefix}q_proj.bias"):
            if name in state:
                rows = state[name].double().unflatten(0, (expand.shape[0], -1))
                found[name] = torch.einsum("hdk,hd...->hk...", expand, rows).flatten(0, 1)
    if old.v.maps != new.v.maps:
        contract = state.pop(f"{prefix}o_contract.weight").double()
        columns = state[prefix + output].double().unflatten(1, (contract.shape[0], -1))
        found[prefix + output] = torch.einsum("hvd,nhd->nhv", contract, columns).flatten(1)
    return {name: weight.contiguous() for name, weight in found.items()}


def _rebuilt(model: Any, plan: Plan, state: dict[str, Tensor]) -> Any:
    """Return a model of the same class with another layout and these tensors."""
    layout = {"kv_layout": [layer.to_json() for layer in plan.layers]}
    config = type(model.config).from_dict(model.config.to_dict() | layout)
    with torch.device("meta"):
        rebuilt = type(model)(config)
    rebuilt.load_state_dict(state, strict=True, assign=True)
    rebuilt.to(next(model.parameters()).device)
    rebuilt.tie_weights()
    rebuilt.config.dtype = model.config.dtype
    return rebuilt.eval()
