"""Llama with compressed latents in its cache."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaPreTrainedModel

from .attention import matmul_attention
from .latent_attention import LatentAttention
from .latent_config import LatentConfig
from .latent_model import LatentModel
from .rope import LatentRotaryEmbedding


class VDLlamaConfig(LatentConfig, LlamaConfig):
    """Llama's config and the ``kv_layout``."""

    model_type = "vdcompress_llama"
    base_model_tp_plan: ClassVar[dict[str, str]] = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_compress": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }


class VDLlamaAttention(LatentAttention):
    """Attention over latents; the name of the output projection is Llama's."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx, output_name="o_proj")

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Any = None,
        attention_mask: Tensor | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Map [b, t, hidden] to [b, t, hidden], through the cache if there is one.

        It is called ``past_key_values`` by transformers before 5.24.
        """
        query, key, value = self.latents(hidden_states, position_embeddings)
        cache = past_key_values if cache is None else cache
        key, value = self.remembered(key, value, cache)
        attention_interface = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, matmul_attention
        )
        attn_output, attn_weights = attention_interface(
            self,
            query,
            key,
            value,
            attention_mask,
            scaling=self.scaling,
            dropout=0.0 if not self.training else self.attention_dropout,
            **kwargs,
        )
        attn_output = attn_output.reshape(*hidden_states.shape[:-1], -1, self.v_head_dim)
        return self.o_proj(self.contract(attn_output)), attn_weights


class VDLlamaModel(LatentModel, LlamaModel):
    """The body: Llama's with our attention and rotary table."""

    config_class = VDLlamaConfig
    _can_record_outputs: ClassVar[dict[str, type]] = {
        "hidden_states": LlamaDecoderLayer,
        "attentions": VDLlamaAttention,
    }

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for index, layer in enumerate(self.layers):
            layer.self_attn = VDLlamaAttention(config, index)
        self.rotary_emb = LatentRotaryEmbedding(config)
        self.keep_latents_packed()
        self.post_init()


class VDLlamaForCausalLM(LatentModel, LlamaForCausalLM):
    """The body and the language modelling head."""

    config_class = VDLlamaConfig
    _can_record_outputs = VDLlamaModel._can_record_outputs

    def __init__(self, config: Any) -> None:
        LlamaPreTrainedModel.__init__(self, config)
        self.model = VDLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
