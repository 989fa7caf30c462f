"""How a compressed model gets the cache that its config asks for."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from .packed_cache import cache_for

CACHE_NAMES = ("cache", "past_key_values")  # since transformers 5.24, and before


def with_own_cache(model: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Give the body of a packed model its own cache where transformers would make a dynamic one.

    A forward pre-hook. Gradients do not flow through a cache, so training goes without.
    """
    uses = kwargs.get("use_cache")
    uses = model.config.use_cache if uses is None else uses
    if not uses or any(kwargs.get(name) is not None for name in CACHE_NAMES):
        return args, kwargs
    if torch.is_grad_enabled():
        return args, kwargs | {"use_cache": False}
    known = inspect.signature(model.forward).parameters
    name = next(name for name in CACHE_NAMES if name in known)
    return args, kwargs | {name: cache_for(model.config)}
