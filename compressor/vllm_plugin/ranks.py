"""Tensor parallelism: which heads and latents a rank holds, and the weights that go with them.

vLLM cuts linear layers by the config's plan. Two things no plan can say: maps per head are cut
between heads, and where there are more ranks than latents each rank keeps one latent whole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.utils import set_weight_attrs

from vdcompress.vllm_plugin.share import Share


def cut(model: nn.Module, tp_group: Any, quant_config: Any) -> None:
    """Prepare the attention modules of ``model`` for this rank; nothing changes for one rank.

    Args:
        model: on the meta device, its linear layers not yet replaced.
        tp_group: vLLM's group of ranks.
        quant_config: vLLM's, for the projections.
    """
    ranks, rank = tp_group.world_size, tp_group.rank_in_group
    if ranks == 1:
        return
    for module in model.modules():
        if not hasattr(module, "v_compress"):
            continue
        layout: Any = module.layout
        config: Any = module.config
        heads = Share.of(config.num_attention_heads, rank, ranks)
        groups = Share.of(layout.k_groups, rank, ranks)
        for name, share in (("q_expand", heads), ("o_contract", heads), ("k_compress", groups)):
            if (head_map := getattr(module, name)) is not None:
                _cut_map(head_map, share)
        if 1 < groups.whole < ranks:
            for name in ("k_proj", "v_compress"):
                linear = _cut_linear(getattr(module, name), groups, quant_config)
                setattr(module, name, linear)


def _cut_map(head_map: nn.Module, share: Share) -> None:
    """Keep the matrices of this rank's heads, or groups, and load no others."""
    for name, parameter in head_map.named_parameters(recurse=False):
        shape = (share.count, *parameter.shape[1:])
        kept = nn.Parameter(torch.empty(shape, dtype=torch.get_default_dtype()), False)
        set_weight_attrs(kept, {"weight_loader": _narrowed(default_weight_loader, share)})
        setattr(head_map, name, kept)


def _cut_linear(linear: nn.Linear, share: Share, quant_config: Any) -> ReplicatedLinear:
    """Return the projection that writes this rank's latents alone."""
    kept = ReplicatedLinear(
        linear.in_features,
        linear.out_features * share.count // share.whole,
        bias=linear.bias is not None,
        quant_config=quant_config,
        return_bias=False,
    )
    for parameter in kept.parameters():
        parameter.weight_loader = _narrowed(parameter.weight_loader, share)
    return kept


def _narrowed(loader: Callable[..., None], share: Share) -> Callable[..., None]:
    """Return a weight loader that hands ``loader`` this share's rows."""

    def load(parameter: Tensor, loaded: Tensor, *rest: Any) -> None:
        loader(parameter, share.rows(loaded), *rest)

    return load
