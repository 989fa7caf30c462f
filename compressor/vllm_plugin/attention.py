"""What our attention modules call in vLLM: the paged attention of their layer."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from vllm.model_executor.models.transformers.base import VLLM_ATTN_ATTR

NAME = "vdcompress_vllm"


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,  # noqa: ARG001  vLLM knows which tokens belong together
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend through vLLM's cache, V no wider than it is.

    Args:
        module: holds vLLM's attention of its layer, which knows the scale.
        query: [1, h, t, k], the tokens of all sequences of a step side by side.
        key: [1, g, t, k].
        value: [1, g, t, v].
        attention_mask: not used.

    Returns:
        The output [t, h * v], and None.
    """
    attend = getattr(module, VLLM_ATTN_ATTR)
    query, key, value = (x.transpose(1, 2).flatten(0, 1).flatten(1) for x in (query, key, value))
    return attend(query, key, value), None
