"""Kinds of cache whose speed is compared: transformers' own, and that of a compressed model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import QuantizedCache

from vdcompress.modeling.packed_cache import cache_for

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

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
