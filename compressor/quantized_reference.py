"""The original model with a quantised cache, simulated: what every smaller cache is measured by.

Keys (after RoPE) and values are rounded per token and key/value head: asymmetric, to the nearest of
``2 ** bits`` levels between the smallest and the largest number, with a scale and a zero point in
16 bits each. Every token's keys and values go through it, also those that a query meets first, so
nothing depends on how a text is cut. The weights stay as they are and nothing is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from vdcompress.errors import UsageError
from vdcompress.evaluate import POSITIONS, Evaluation, evaluate
from vdcompress.events import OnEvent, ignore
from vdcompress.plan import ModelShape

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GROUP_BITS = 32
MOST_BITS = 8


@dataclass(frozen=True)
class QuantizedCache:
    """A cache of the original model's keys and values in few bits.

    Attributes:
        k_bits: of a key's numbers, 1 to 8.
        v_bits: of a value's numbers, 1 to 8.
    """

    k_bits: int
    v_bits: int

    def __post_init__(self) -> None:
        """Raise :class:`UsageError` for a number of bits that the rounding does not know."""
        for bits in (self.k_bits, self.v_bits):
            if not 1 <= bits <= MOST_BITS:
                raise UsageError(f"{bits} bits are not between 1 and {MOST_BITS}")

    @property
    def name(self) -> str:
        """Return what tables call it: ``int8``, or ``k8-v4`` where the sides differ."""
        if self.k_bits == self.v_bits:
            return f"int{self.k_bits}"
        return f"k{self.k_bits}-v{self.v_bits}"

    def bytes_per_token(self, shape: ModelShape) -> int:
        """Return the bytes of one token over all layers, scales and zero points included.

        Args:
            shape: of the original model. A head's numbers are packed to whole bytes.
        """
        head = sum(-(-shape.head_dim * bits // 8) for bits in (self.k_bits, self.v_bits))
        return shape.layers * shape.kv_heads * (head + 2 * GROUP_BITS // 8)

    @contextmanager
    def applied(self, model: PreTrainedModel) -> Iterator[None]:
        """Let a model attend over this cache inside the block; afterwards it is as it was.

        Args:
            model: a base model whose attention comes from transformers' registry.
        """
        name = f"vdcompress_cache_{self.name}"
        AttentionInterface.register(name, self._attend)
        AttentionMaskInterface.register(name, sdpa_mask)
        before = model.config._attn_implementation
        model.config._attn_implementation = name
        try:
            yield
        finally:
            model.config._attn_implementation = before

    def _attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Attend by torch's scaled dot product over keys [b, g, s, d] and values as read back."""
        key, value = read_back(key, self.k_bits), read_back(value, self.v_bits)
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return output, None


INT8 = QuantizedCache(8, 8)
INT4 = QuantizedCache(4, 4)


def read_back(x: Tensor, bits: int) -> Tensor:
    """Return what a quantised cache gives back for what was written to it.

    Args:
        x: [..., d]; each vector of d numbers has a scale and a zero point of its own.
        bits: of each number.
    """
    low, high = x.aminmax(dim=-1, keepdim=True)
    levels = 2**bits - 1
    zero = low.half().to(x.dtype)
    scale = ((high - zero) / levels).half().to(x.dtype)
    step = torch.where(scale > 0, scale, 1)
    codes = ((x - zero) / step).round().clamp(0, levels)
    return codes * scale + zero


def evaluate_quantized(
    model: PreTrainedModel,
    tokens: Tensor,
    cache: QuantizedCache,
    *,
    window: int = 2048,
    windows: int = 24,
    positions: Sequence[int] = POSITIONS,
    batch: int = 1,
    on_event: OnEvent = ignore,
) -> Evaluation:
    """Measure the original model with a quantised cache beside itself without.

    Args:
        model: the base model; it attends as before when this ends, however it ends.
        tokens: the text, int64, shape [n].
        cache: how keys and values are rounded.
        window: inputs per window.
        windows: most windows to use.
        positions: edges of the buckets in which perplexity is also given.
        batch: windows per forward pass.
        on_event: as in :func:`~vdcompress.evaluate.evaluate`.

    Raises:
        VDCompressError: as :func:`~vdcompress.evaluate.evaluate` does.
    """
    return evaluate(
        cast("PreTrainedModel", _Through(model, cache)),
        tokens,
        base=model,
        window=window,
        windows=windows,
        positions=positions,
        batch=batch,
        on_event=on_event,
    )


class _Through:
    """A model whose body attends over a quantised cache; whatever else is asked, it is itself."""

    def __init__(self, model: PreTrainedModel, cache: QuantizedCache) -> None:
        self._model = model
        self._cache = cache

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    @property
    def base_model(self) -> Callable[..., Any]:
        return self._run

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        with self._cache.applied(self._model):
            return self._model.base_model(*args, **kwargs)
