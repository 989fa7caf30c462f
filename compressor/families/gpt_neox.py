"""GPT-NeoX: Pythia and its relatives, partial rotary, packed query_key_value."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import GPTNeoXForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXRotaryEmbedding

from vdcompress.families.base import AttentionWeights, Family, Projection
from vdcompress.plan import ModelShape

SIZES = ("14m", "31m", "70m", "160m", "410m", "1b", "1.4b", "2.8b", "6.9b", "12b")


class GPTNeoX(Family):
    """Adapter for ``gpt_neox``."""

    model_type = "gpt_neox"
    attention_name = "attention"
    output_name = "dense"
    aliases: ClassVar[dict[str, str]] = {
        f"pythia-{size}{variant}": f"EleutherAI/pythia-{size}{variant}"
        for size in SIZES
        for variant in ("", "-deduped")
    }
    stored_as: ClassVar[dict[str, str]] = {"lm_head.weight": "embed_out.weight"}

    def shape(self, config: PreTrainedConfig) -> ModelShape:
        """Read the shape; every head is a key/value head."""
        head_dim = config.hidden_size // config.num_attention_heads
        factor = config.rope_parameters.get("partial_rotary_factor", 1.0)
        return ModelShape(
            family=self.model_type,
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_attention_heads,
            head_dim=head_dim,
            rotary_dim=int(head_dim * factor),
        )

    def base_class(self) -> type[PreTrainedModel]:
        """Return transformers' class."""
        return GPTNeoXForCausalLM

    def compressed_class(self) -> type[PreTrainedModel]:
        """Return ours."""
        from vdcompress.modeling.gpt_neox import VDGPTNeoXForCausalLM

        return VDGPTNeoXForCausalLM

    def compressed_body(self) -> type[PreTrainedModel]:
        """Return our body."""
        from vdcompress.modeling.gpt_neox import VDGPTNeoXModel

        return VDGPTNeoXModel

    def layers_prefix(self) -> str:
        """Return the prefix of the layers."""
        return "gpt_neox.layers"

    def projection_bias(self, config: PreTrainedConfig) -> dict[str, bool]:
        """Return one answer for all four."""
        return dict.fromkeys("qkvo", bool(config.attention_bias))

    def weights(self, attention: nn.Module) -> AttentionWeights:
        """Unpack query_key_value, whose rows are q, k, v of the first head, then of the second."""
        packed: Any = attention.query_key_value
        d = int(attention.head_size)  # type: ignore[arg-type]
        q, k, v = (
            Projection(_rows(packed.weight, slot, d), _rows(packed.bias, slot, d))
            for slot in range(3)
        )
        dense: Any = attention.dense
        return AttentionWeights(q, k, v, Projection(dense.weight.detach(), _detach(dense.bias)))

    def rotary_class(self) -> type[nn.Module]:
        """Return transformers' rotary table."""
        return GPTNeoXRotaryEmbedding


def _rows(packed: Tensor | None, slot: int, d: int) -> Any:
    """[H 3 d, ...] -> the rows [H d, ...] of one of q, k, v."""
    if packed is None:
        return None
    return packed.detach().unflatten(0, (-1, 3, d))[:, slot].flatten(0, 1)


def _detach(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach()


FAMILY = GPTNeoX()
