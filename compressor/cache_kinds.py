"""Kinds of cache whose speed is compared: transformers' own, and that of a compressed model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import QuantizedCache

from vdcompress.modeling.packed_cache import cache_for
from vdcompress.plan import DTYPE_BYTES, Plan

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

ROOM = 1.25  # spare room of a growing cache, at most
ACTIVATIONS = 16  # times the hidden width, that a layer holds of each token of a prompt
STORES = ("keys", "values", "_quantized_keys", "_quantized_values")


@dataclass(frozen=True)
class CacheKind:
    """A kind of cache.

    Attributes:
        name: of it in tables, such as ``static``.
        make: takes a model's config and the most tokens, and returns an empty cache.
        bits: of each stored number; None for the model's dtype.
        needs: the package behind it, empty where transformers suffices.
    """

    name: str
    make: Callable[[PreTrainedConfig, int], Any]
    bits: int | None = None
    needs: str = ""


def _quantized(backend: str, **options: Any) -> Callable[[PreTrainedConfig, int], Any]:
    return lambda config, _tokens: QuantizedCache(backend, config, **options)


DYNAMIC = CacheKind("dynamic", lambda config, _tokens: DynamicCache(config=config))
STATIC = CacheKind("static", lambda config, tokens: StaticCache(config, max_cache_len=tokens))
QUANTIZED = (
    CacheKind("quanto int4", _quantized("quanto", nbits=4), 4, "optimum-quanto"),
    CacheKind("hqq int4", _quantized("hqq", nbits=4, axis_key=1, axis_value=1), 4, "hqq"),
    CacheKind("fp8", _quantized("fp8"), 8, "a newer transformers"),
)
STOCK = (DYNAMIC, STATIC, *QUANTIZED)
OWN = CacheKind("own", lambda config, _tokens: cache_for(config))


def unavailable(kind: CacheKind, config: PreTrainedConfig) -> str:
    """Return why this machine has no such cache, empty if it has."""
    try:
        kind.make(config, 1)
    except (ImportError, ValueError):
        if not kind.needs:
            raise
        return f"needs {kind.needs}"
    return ""


def stored_nbytes(cache: Any, tokens: int) -> tuple[int, int]:
    """Return the bytes that a cache's tokens take, over layers and sequences, and its memory.

    Args:
        cache: any of these kinds, with tokens in it.
        tokens: how many; what a static cache keeps room for beyond them is memory alone.
    """
    if hasattr(cache, "nbytes_allocated"):
        return cache.nbytes(), cache.nbytes_allocated()
    stored = allocated = 0
    for layer in cache.layers:
        held = sum(_nbytes(getattr(layer, name, None)) for name in STORES)
        allocated += held
        room = getattr(layer, "max_cache_len", None)
        stored += held if room is None else held * tokens // room
    return stored, allocated


def needed_bytes(plan: Plan, kind: CacheKind, context: int, batch: int, dtype: str) -> int:
    """Estimate the memory of a cache: what it stores, its spare room, one layer's copy in full.

    Args:
        plan: of the compressed model.
        kind: of cache; the stock ones are the base's.
        context: tokens cached.
        batch: sequences.
        dtype: of numbers that are not packed.
    """
    number = DTYPE_BYTES[dtype]
    full = plan.base_bytes_per_token // 2 * number * context
    stored = full if kind.bits is None else full * kind.bits // (8 * number)
    if kind is OWN:
        stored = plan.cache_bytes(context, dtype)
    return batch * int(stored * ROOM + 2 * full / plan.shape.layers)


def prompt_bytes(plan: Plan, tokens: int, batch: int, dtype: str) -> int:
    """Estimate the memory of what a layer computes for a prompt.

    Args:
        plan: of the compressed model.
        tokens: of each sequence's prompt.
        batch: sequences.
        dtype: of the activations.
    """
    return batch * tokens * plan.shape.hidden * ACTIVATIONS * DTYPE_BYTES[dtype]


def _nbytes(held: Any) -> int:
    """Sum over what a quantised layer holds: tensors, those of a subclass, and their settings."""
    if isinstance(held, Tensor):
        if not hasattr(held, "__tensor_flatten__"):
            return held.numel() * held.element_size()
        names, _ = held.__tensor_flatten__()
        return sum(_nbytes(getattr(held, name)) for name in names)
    if isinstance(held, dict):
        return sum(map(_nbytes, held.values()))
    return sum(map(_nbytes, held)) if isinstance(held, (tuple, list)) else 0
