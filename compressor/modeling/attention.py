"""Attention over latents as they are cached, registered with transformers as :data:`NAME`.

Shapes: b batch, h query heads, g latents (groups), t query positions, s key positions, k width of
a key latent, v width of a value latent. Groups of keys and of values may differ in number; one
number divides the other.

A prefill runs through torch's scaled dot product attention. On CPU its fast kernel wants equal
widths, so the narrower side is padded with zeros for the call (the cache never holds them). cuDNN
comes first for a prompt on CUDA, and last for one query but in a compiled model: it plans anew for
every length of a cache, which takes it tens of milliseconds. One query against a CPU cache is two
plain matrix products, which read the cache once and are faster than any kernel torch has there for
unequal widths; in half precision that kernel is faster where it takes the latents as they are.
Latents in few bits are attended where they are packed, by :mod:`packed_attention`. Where there is
Triton one query on CUDA is left to :mod:`triton_decode`, and where there is numba one query on a
CPU to :mod:`numba_decode`.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .packed_attention import packed_attention, use_kernel
from .packed_latents import PackedLatents
from .packed_prompt import padded
from .rounded_latents import RoundedLatents, rounded_attention
from .thin_products import dots, sums

REQUESTED = "vdcompress"  # as a caller may name it
# each exported folder carries a copy of this file, which knows no other copy's packed latents
NAME = REQUESTED if __name__.startswith(f"{REQUESTED}.") else f"{REQUESTED}.{__name__}"
WORTH_BYTES = 2**23  # of latents in 16 bits from which on a kernel's time outweighs its launch
KERNEL_DEVICES = ("cuda", "cpu")
FIXED_ORDER = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
DECODE_ORDER = [*FIXED_ORDER[1:-1], FIXED_ORDER[0], FIXED_ORDER[-1]]


def matmul_attention(  # noqa: PLR0917
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Attend by plain matrix products; each latent is read once for all heads that share it.

    Args:
        module: the attention module; only its ``training`` flag is read.
        query: [b, h, t, k].
        key: [b, g, s, k].
        value: [b, g', s, v].
        attention_mask: None, or boolean (True attends) or additive, broadcastable to [b, h, t, s].
        scaling: factor of the scores.
        dropout: probability to drop an attention weight while training.

    Returns:
        The output [b, t, h, v] and the weights [b, h, t, s].
    """
    b, h, t, _k = query.shape
    groups, s = key.shape[1], key.shape[2]
    grouped = query.reshape(b * groups, (h // groups) * t, -1)
    scores = dots(grouped, key.flatten(0, 1)).reshape(b, h, t, s) * scaling
    if attention_mask is not None:
        if attention_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
        else:
            scores = scores + attention_mask
    weights = functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = functional.dropout(weights, p=dropout, training=module.training)
    groups = value.shape[1]
    output = sums(weights.reshape(b * groups, (h // groups) * t, s), value.flatten(0, 1))
    return output.view(b, h, t, -1).transpose(1, 2).contiguous(), weights


def latent_attention(  # noqa: PLR0917
    module: nn.Module,
    query: Tensor,
    key: Any,
    value: Any,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attend by whatever is fastest for these shapes on this device.

    Arguments and output are those of :func:`matmul_attention`; the weights are None. ``key`` and
    ``value`` may be packed, or rounded without a cache.
    """
    if isinstance(key, RoundedLatents) or isinstance(value, RoundedLatents):
        return rounded_attention(module, query, key, value, attention_mask, scaling, dropout)
    if isinstance(key, PackedLatents):
        return packed_attention(module, query, key, value, attention_mask, scaling)
    if query.device.type in KERNEL_DEVICES and query.shape[2] == 1 and not dropout:
        found = _decoded(query, key, value, attention_mask, scaling)
        if found is not None:
            return found.transpose(1, 2), None
    on_cpu = query.device.type == "cpu"
    one = query.shape[2] == 1 and not query.requires_grad
    if on_cpu and one and not _alike_in_half(query, key, value):
        output, _ = matmul_attention(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout
        )
        return output, None
    key, value = _same_groups(key, value)
    width = value.shape[-1]
    if on_cpu:
        widest = max(query.shape[-1], width)
        query, key, value = (padded(x, widest) for x in (query, key, value))
    grows = query.shape[2] == 1 and not torch.compiler.is_compiling()
    order = DECODE_ORDER if grows else FIXED_ORDER
    with sdpa_kernel(order, set_priority=True) if query.is_cuda else contextlib.nullcontext():
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    return output[..., :width], None


def _decoded(
    query: Tensor, key: Any, value: Any, mask: Tensor | None, scaling: float
) -> Tensor | None:
    """Return what the device's kernel makes of one query [b, h, 1, v]; None without one."""
    if torch.compiler.is_compiling():
        return None
    try:
        if query.is_cuda:
            from .triton_decode import attend_exact, attend_packed
        else:
            from .numba_decode import attend_exact, attend_packed
    except ImportError:
        return None
    if isinstance(key, PackedLatents):
        return attend_packed(query, key, value, mask, scaling)
    if query.is_cuda and not _is_worth_launching(key, value):
        return None
    return attend_exact(query, key, value, mask, scaling)


def _is_worth_launching(key: Tensor, value: Tensor) -> bool:
    """Whether a kernel's launch costs less than it saves; in a graph it costs nothing."""
    if torch.cuda.is_current_stream_capturing():
        return True
    return 2 * (key.numel() + value.numel()) >= WORTH_BYTES


def _alike_in_half(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether both sides have one latent per head, of one width, in half precision."""
    return query.element_size() == 2 and key.shape == value.shape and key.shape[1] == query.shape[1]


def _same_groups(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Repeat the side with fewer latents, so that both have one per group of query heads."""
    groups = max(key.shape[1], value.shape[1])
    key, value = (
        x if x.shape[1] == groups else x.repeat_interleave(groups // x.shape[1], dim=1)
        for x in (key, value)
    )
    return key, value


for _device in KERNEL_DEVICES:
    use_kernel(_device, _decoded)
AttentionInterface.register(NAME, latent_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
