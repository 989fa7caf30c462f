"""What all compressed families share beside attention: their cache, and how weights begin."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import DynamicCache
from transformers.utils import logging

from .attention import NAME as ATTENTION
from .cache import LatentCache
from .latent_attention import HeadMap
from .packed_cache import cache_for
from .rope import LatentRotaryEmbedding

logger = logging.get_logger(__name__)
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


class LatentModel:
    """Mixin before a transformers model class: its attention function, cache and initialisation."""

    def keep_latents_packed(self) -> None:
        """Let a forward pass of this body use the cache that its config asks for."""
        if self.config.packed:  # type: ignore[attr-defined]
            self.register_forward_pre_hook(with_own_cache, with_kwargs=True)  # type: ignore[attr-defined]

    def get_correct_attn_implementation(
        self, requested_attention: str | None, is_init_check: bool = False
    ) -> str:
        """Use our attention function unless the caller names another."""
        chosen: str = super().get_correct_attn_implementation(
            requested_attention or ATTENTION, is_init_check
        )
        return chosen

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, LatentRotaryEmbedding):
            module.refill()
        elif isinstance(module, HeadMap):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)  # type: ignore[attr-defined]
            if module.bias is not None:
                init.zeros_(module.bias)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Give ``generate()`` our cache where it would make a dynamic one.

        A cache of another kind holds what it is given, so latents in few bits are not rounded in
        it: that is another model than was measured, and is said.
        """
        given = {name for name in CACHE_NAMES if model_kwargs.get(name) is not None}
        prepared = super()._prepare_cache_for_generation(
            generation_config, model_kwargs, *args, **kwargs
        )
        for name in CACHE_NAMES:
            made = model_kwargs.get(name)
            if name not in given and isinstance(made, DynamicCache):
                model_kwargs[name] = made = cache_for(self.config, offloading=made.offloading)  # type: ignore[attr-defined]
            if self.config.packed and made is not None and not isinstance(made, LatentCache):  # type: ignore[attr-defined]
                logger.warning(
                    f"a {type(made).__name__} keeps the latents of this model in 16 bits and "
                    "rounds none: neither its bytes nor its perplexity are those that were "
                    "measured; name no cache to get the model's own"
                )
        return prepared
