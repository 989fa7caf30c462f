"""Stand between a model and its attention function, for the time of a block.

Transformers' models call their attention through a registry, with queries and keys behind RoPE and
any norm: the one place that looks the same in every family.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

Attend = Callable[..., tuple[Tensor, Tensor | None]]


@contextmanager
def attending_by(model: PreTrainedModel, name: str, attend: Attend) -> Iterator[None]:
    """Let a model attend by a function of ours inside the block; afterwards it is as it was.

    Args:
        model: whose attention comes from transformers' registry.
        name: to register the function under.
        attend: takes (module, query [b, H, t, d], key [b, G, s, d], value [b, G, s, d],
            attention_mask, scaling=..., ...) and returns (output [b, t, H, d], None); masks are
            those of scaled dot product attention.
    """
    config: Any = model.config
    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, sdpa_mask)
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before
