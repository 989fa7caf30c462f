"""GPT-NeoX with compressed latents in its cache."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, GPTNeoXModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXLayer, GPTNeoXPreTrainedModel

from .attention import matmul_attention
from .latent_attention import LatentAttention
from .latent_config import LatentConfig
from .latent_model import LatentModel
from .rope import LatentRotaryEmbedding


class VDGPTNeoXConfig(LatentConfig, GPTNeoXConfig):
    """GPT-NeoX's config and the ``kv_layout``."""

    model_type = "vdcompress_gpt_neox"
    base_model_tp_plan: ClassVar[dict[str, str]] = {
        "layers.*.attention.q_proj": "colwise",
        "layers.*.attention.k_proj": "colwise",
        "layers.*.attention.v_compress": "colwise",
        "layers.*.attention.dense": "rowwise",
        "layers.*.mlp.dense_h_to_4h": "colwise",
        "layers.*.mlp.dense_4h_to_h": "rowwise",
    }


class VDGPTNeoXAttention(LatentAttention):
    """Attention over latents; the name of the output projection is GPT-NeoX's."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx, output_name="dense")

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        layer_past: Any = None,
        position_embeddings: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Map [b, t, hidden] to [b, t, hidden], through ``layer_past`` if there is a cache."""
        query, key, value = self.latents(hidden_states, position_embeddings)
        key, value = self.remembered(key, value, layer_past)
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
        return self.dense(self.contract(attn_output)), attn_weights


class VDGPTNeoXModel(LatentModel, GPTNeoXModel):
    """The body: GPT-NeoX's with our attention and rotary table."""

    config_class = VDGPTNeoXConfig
    _can_record_outputs: ClassVar[dict[str, type]] = {
        "hidden_states": GPTNeoXLayer,
        "attentions": VDGPTNeoXAttention,
    }

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for index, layer in enumerate(self.layers):
            layer.attention = VDGPTNeoXAttention(config, index)
        self.rotary_emb = LatentRotaryEmbedding(config)
        self.keep_latents_packed()
        self.post_init()


class VDGPTNeoXForCausalLM(LatentModel, GPTNeoXForCausalLM):
    """The body and the language modelling head."""

    config_class = VDGPTNeoXConfig
    _can_record_outputs = VDGPTNeoXModel._can_record_outputs

    def __init__(self, config: Any) -> None:
        GPTNeoXPreTrainedModel.__init__(self, config)
        self.gpt_neox = VDGPTNeoXModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
