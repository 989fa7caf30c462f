"""What a model from scratch is: a GPT-NeoX of given size, and what becomes of its values.

The widths of its cache are a :class:`~vdcompress.plan.Plan` like that of any compressed model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vdcompress.errors import RecipeError

if TYPE_CHECKING:
    from transformers import GPTNeoXConfig

FAMILY = "gpt_neox"


@dataclass(frozen=True)
class Architecture:
    """A GPT-NeoX in the words of its config; what is not said is Pythia-70M's.

    Attributes:
        vocab_size: rows of the input and of the output embedding, which are not tied.
        hidden_size: width of the residual stream.
        num_hidden_layers: layers.
        num_attention_heads: heads; each has its own key and value.
        intermediate_size: width inside the MLP.
        max_position_embeddings: longest input.
        rotary_pct: part of each head that RoPE rotates.
        qk_bias: whether queries and keys have a bias; values and the output projection always do.
        restore_from: values pass through so many dimensions per token and layer, and are restored
            to full width before attention, so the cache is as large as ever; None leaves this out.
    """

    vocab_size: int = 50_304
    hidden_size: int = 512
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    intermediate_size: int = 2048
    max_position_embeddings: int = 2048
    rotary_pct: float = 0.25
    qk_bias: bool = False
    restore_from: int | None = None

    def require_sound(self) -> None:
        """Raise one :class:`RecipeError` that names every number that does not fit the others."""
        hidden, heads, found = self.hidden_size, self.num_attention_heads, []
        if hidden % heads:
            found.append(f"hidden_size {hidden} is not divisible by {heads} heads")
        elif int(hidden // heads * self.rotary_pct) % 2:
            found.append(f"rotary_pct {self.rotary_pct:g} of a head of {hidden // heads} is odd")
        if self.restore_from is not None and not 0 < self.restore_from < hidden:
            found.append(f"restore_from {self.restore_from} is not between 0 and {hidden}")
        if found:
            raise RecipeError(f"scratch: {'; '.join(found)}")

    def config(self) -> GPTNeoXConfig:
        """Return the config of the model with all its values at full width, as transformers has it.

        Its ``attention_bias`` says what queries and keys have.
        """
        from transformers import GPTNeoXConfig

        return GPTNeoXConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            intermediate_size=self.intermediate_size,
            max_position_embeddings=self.max_position_embeddings,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 10_000.0,
                "partial_rotary_factor": self.rotary_pct,
            },
            attention_bias=self.qk_bias,
            bos_token_id=0,
            eos_token_id=0,
        )
