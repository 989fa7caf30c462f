"""Compressed models on vLLM's Transformers backend: one class for all families."""

from __future__ import annotations

from typing import Any

from transformers import AttentionInterface
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.transformers import TransformersForCausalLM
from vllm.model_executor.models.utils import extract_layer_index

from vdcompress.modeling.layout import LayerLayout
from vdcompress.vllm_plugin.attention import NAME, paged_attention
from vdcompress.vllm_plugin.backends import backend_for
from vdcompress.vllm_plugin.ranks import cut
from vdcompress.vllm_plugin.share import Share

AttentionInterface.register(NAME, paged_attention)


class LatentForCausalLM(TransformersForCausalLM):  # type: ignore[misc]
    """A compressed model whose paged cache holds latents as wide as they are."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        config = vllm_config.model_config.hf_config
        self.layouts = [config.layer_layout(layer) for layer in range(config.num_hidden_layers)]
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        # vLLM finds the attention modules by its own function's name, which pads V: ours takes over
        self.text_config._attn_implementation = NAME

    def recursive_replace(self) -> None:
        """Cut what vLLM's plan cannot cut, then let vLLM replace the rest."""
        cut(self.model, self.tp_group, self.quant_config)
        super().recursive_replace()

    def _get_attn_cls(self) -> Any:
        """Return what makes a layer's attention, with that layer's own widths."""
        ranks, rank = self.tp_group.world_size, self.tp_group.rank_in_group

        def attention(**kwargs: Any) -> Attention:
            layout: LayerLayout = self.layouts[extract_layer_index(kwargs["prefix"])]
            own = {
                "head_size": layout.k_head_dim,
                "head_size_v": layout.v_head_dim,
                "num_kv_heads": Share.of(layout.k_groups, rank, ranks).count,
                "attn_backend": backend_for(layout, self.vllm_config),
            }
            return Attention(**kwargs | own)

        return attention
