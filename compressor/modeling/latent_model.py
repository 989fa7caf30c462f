"""What all compressed families share beside attention: cache, decoding, how weights begin."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import DynamicCache
from transformers.utils import logging

from .attention import NAME as ATTENTION
from .attention import REQUESTED
from .cache import LatentCache
from .graphed_steps import GraphedSteps, can_be_captured
from .latent_attention import HeadMap
from .own_cache import CACHE_NAMES, with_own_cache
from .packed_cache import cache_for
from .rope import LatentRotaryEmbedding

logger = logging.get_logger(__name__)


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
        named = requested_attention or REQUESTED
        chosen: str = super().get_correct_attn_implementation(
            ATTENTION if named == REQUESTED else named, is_init_check
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

    def _valid_auto_compile_criteria(
        self, model_kwargs: dict[str, Any], generation_config: Any
    ) -> bool:
        """Ask ``generate()`` for :meth:`get_compiled_call` where steps can be replayed as well."""
        compiles = bool(super()._valid_auto_compile_criteria(model_kwargs, generation_config))
        if compiles or generation_config.disable_compile:
            return compiles
        caches = (model_kwargs.get(name) for name in CACHE_NAMES)
        return any(isinstance(cache, LatentCache) for cache in caches) and can_be_captured(self)

    def get_compiled_call(self, compile_config: Any) -> Any:
        """Return what ``generate()`` calls for each token: a replayed step, with our cache."""
        return GraphedSteps(self, super().get_compiled_call(compile_config))
