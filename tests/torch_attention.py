"""A paged attention backend for vLLM in plain torch, for tests alone: any widths, any device.

It registers as vLLM's ``CUSTOM`` backend (``register`` is an entry point of a distribution that
the tests lay beside it), and a test asks for it by that name. A block's cache is one tensor
[g, block, k + v]: K and V of a token side by side, each at its own width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.kv_cache_interface import KVCacheLayout


def register() -> None:
    """Give the name CUSTOM to this backend."""
    register_backend(AttentionBackendEnum.CUSTOM, "torch_attention.TorchAttentionBackend")


class TorchAttentionBackend(AttentionBackend):
    """What vLLM asks a backend."""

    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float32, torch.bfloat16]
    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto"]
    head_size_v = 0

    @classmethod
    def set_head_size_v(cls, head_size_v: int) -> None:
        cls.head_size_v = head_size_v

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[TorchAttention]:
        return TorchAttention

    @staticmethod
    def get_builder_cls() -> type[TorchMetadataBuilder]:
        return TorchMetadataBuilder

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        return (KVCacheLayout.LBHNC,)


@dataclass
class TorchMetadata:
    """What one step attends: plain lists, one entry per sequence.

    Attributes:
        starts: where a sequence's queries begin among the step's tokens, and where the last ends.
        lengths: tokens of each sequence in the cache, those of this step included.
        blocks: block numbers [sequences, blocks].
        slots: where each of the step's tokens goes [tokens].
    """

    starts: list[int]
    lengths: list[int]
    blocks: Tensor
    slots: Tensor


class TorchMetadataBuilder(AttentionMetadataBuilder[TorchMetadata]):
    """Reads them out of vLLM's own."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> TorchMetadata:
        common = common_attn_metadata
        tokens, sequences = common.num_actual_tokens, common.num_reqs
        return TorchMetadata(
            starts=common.query_start_loc[: sequences + 1].tolist(),
            lengths=common.seq_lens[:sequences].tolist(),
            blocks=common.block_table_tensor.long(),
            slots=common.slot_mapping[:tokens].long(),
        )


class TorchAttention(AttentionImpl[TorchMetadata]):
    """Write the step's tokens, then attend sequence by sequence."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        *_rest: Any,
        **_more: Any,
    ) -> None:
        self.scale, self.width, self.kv_cache_dtype = scale, head_size, "auto"

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: TorchMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Fill ``output`` [t, h, v] for ``query`` [t, h, k] from a cache [blocks, g, n, k + v]."""
        if attn_metadata is None:
            return output.fill_(0)
        slots, size = attn_metadata.slots, kv_cache.shape[2]
        new = torch.cat((key, value), dim=-1)[: len(slots)]
        kv_cache[slots // size, :, slots % size] = new.to(kv_cache.dtype)
        for number, length in enumerate(attn_metadata.lengths):
            first, last = attn_metadata.starts[number : number + 2]
            pages = kv_cache[attn_metadata.blocks[number, : -(-length // size)]]
            latents = pages.transpose(0, 1).flatten(1, 2)[:, :length]
            output[first:last] = self._attend(query[first:last], latents)
        return output

    def _attend(self, query: Tensor, latents: Tensor) -> Tensor:
        """Attend from the last t of s tokens: [t, h, k] and [g, s, k + v] -> [t, h, v]."""
        t, s = query.shape[0], latents.shape[1]
        keys, values = latents.split([self.width, latents.shape[-1] - self.width], dim=-1)
        grouped = query.unflatten(1, (latents.shape[0], -1))
        scores = torch.einsum("tgnk,gsk->gnts", grouped, keys) * self.scale
        hidden = torch.ones(t, s, dtype=torch.bool).triu(1 + s - t)
        weights = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1)
        return torch.einsum("gnts,gsv->tgnv", weights, values).flatten(1, 2)
