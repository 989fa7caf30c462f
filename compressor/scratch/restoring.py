"""GPT-NeoX whose values are narrowed and restored before attention: what V-DProj is measured by.

The cache keeps restored values at full width, so nothing is saved. That is why this architecture
lives here and not in ``modeling/``: it is trained to be compared with, never applied or exported.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vdcompress.modeling.gpt_neox import (
    VDGPTNeoXAttention,
    VDGPTNeoXConfig,
    VDGPTNeoXForCausalLM,
)


class RestoringGPTNeoXConfig(VDGPTNeoXConfig):
    """The config of a full-width ``kv_layout``, and the width that values pass through."""

    model_type = "vdcompress_restoring_gpt_neox"
    restore_from: int = 0


class RestoredValues(nn.Module):
    """Two projections with biases: [b, t, hidden] -> [b, t, width] -> [b, t, v_dim]."""

    def __init__(self, hidden: int, width: int, v_dim: int) -> None:
        super().__init__()
        self.compress = nn.Linear(hidden, width)
        self.restore = nn.Linear(width, v_dim)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return the restored values."""
        restored: Tensor = self.restore(self.compress(hidden_states))
        return restored


class RestoringAttention(VDGPTNeoXAttention):
    """Full-width attention over restored values."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        v_dim = self.layout.v_dim
        self.v_compress: Any = RestoredValues(config.hidden_size, config.restore_from, v_dim)

    def changed_projections(self) -> tuple[str, ...]:
        """Return the module of both value projections, all that sets it apart."""
        return ("v_compress",)


class RestoringGPTNeoXForCausalLM(VDGPTNeoXForCausalLM):
    """The body with such attention, and the language modelling head."""

    config_class = RestoringGPTNeoXConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for index, layer in enumerate(self.gpt_neox.layers):
            layer.attention = RestoringAttention(config, index)
        self.post_init()  # type: ignore[no-untyped-call]
