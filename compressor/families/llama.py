"""Llama: full rotary, grouped queries, separate projections without bias."""

from __future__ import annotations

from typing import ClassVar

from torch import nn
from transformers import LlamaForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from vdcompress.families.base import AttentionWeights, Family, Projection
from vdcompress.plan import ModelShape


class Llama(Family):
    """Adapter for ``llama``."""

    model_type = "llama"
    attention_name = "self_attn"
    output_name = "o_proj"
    aliases: ClassVar[dict[str, str]] = {
        "llama-3.2-1b": "meta-llama/Llama-3.2-1B",
        "llama-3.2-3b": "meta-llama/Llama-3.2-3B",
        "llama-3.1-8b": "meta-llama/Llama-3.1-8B",
        "smollm2-135m": "HuggingFaceTB/SmolLM2-135M",
        "smollm2-360m": "HuggingFaceTB/SmolLM2-360M",
        "tinyllama-1.1b": "TinyLlama/TinyLlama_v1.1",
    }

    def shape(self, config: PreTrainedConfig) -> ModelShape:
        """Read the shape; RoPE rotates whole heads."""
        head_dim = config.head_dim or config.hidden_size // config.num_attention_heads
        return ModelShape(
            family=self.model_type,
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=head_dim,
            rotary_dim=head_dim,
        )

    def base_class(self) -> type[PreTrainedModel]:
        """Return transformers' class."""
        return LlamaForCausalLM

    def compressed_class(self) -> type[PreTrainedModel]:
        """Return ours."""
        from vdcompress.modeling.llama import VDLlamaForCausalLM

        return VDLlamaForCausalLM

    def compressed_body(self) -> type[PreTrainedModel]:
        """Return our body."""
        from vdcompress.modeling.llama import VDLlamaModel

        return VDLlamaModel

    def layers_prefix(self) -> str:
        """Return the prefix of the layers."""
        return "model.layers"

    def projection_bias(self, config: PreTrainedConfig) -> dict[str, bool]:
        """Return one answer for all four."""
        return dict.fromkeys("qkvo", bool(config.attention_bias))

    def weights(self, attention: nn.Module) -> AttentionWeights:
        """Return the four projections as they are."""
        return AttentionWeights(
            *(_projection(attention.get_submodule(f"{name}_proj")) for name in "qkvo")
        )

    def rotary_class(self) -> type[nn.Module]:
        """Return transformers' rotary table."""
        return LlamaRotaryEmbedding


def _projection(module: nn.Module) -> Projection:
    parameters = dict(module.named_parameters())
    bias = parameters.get("bias")
    return Projection(parameters["weight"].detach(), None if bias is None else bias.detach())


FAMILY = Llama()
