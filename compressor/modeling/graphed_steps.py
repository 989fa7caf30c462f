"""Decoding from a CUDA graph: a step of the model is captured once and replayed for every token.

Without one, Python launches each kernel after the one before, which takes longer than they do. The
first step is called, and the second one captured; it is captured anew when the cache has moved to a
larger room. Whatever a graph cannot do as a call would, is called.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import logging

from .attention import NAME as ATTENTION
from .cache import LatentCache
from .counted_cache import CountedCache
from .decode_spans import HALVES
from .own_cache import CACHE_NAMES, with_own_cache
from .step_counts import Place

logger = logging.get_logger(__name__)
OUTPUT_CACHE = next(
    name for name in CACHE_NAMES if name in CausalLMOutputWithPast.__dataclass_fields__
)
IDS, MASK, POSITIONS = "input_ids", "attention_mask", "position_ids"
MASK_GROWTH = 2  # tokens that a mask has room for: bytes, that are few beside a cache
KNOWN = {IDS, MASK, POSITIONS, *CACHE_NAMES, "use_cache", "return_dict", "logits_to_keep"}


def capture(call: Callable[[], Any]) -> Callable[[], Any]:
    """Capture what a call does on CUDA, without doing it; return what does it.

    The call was made before, so that all is compiled and loaded.
    """
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            call()
        finally:
            graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    return graph.replay


CAPTURES: dict[str, Callable[[Callable[[], Any]], Callable[[], Any]]] = {"cuda": capture}


class GraphedSteps:
    """A model's call, for ``generate()``: steps of one token are replayed where that can be.

    Args:
        model: a compressed one.
        otherwise: what is called with a cache of another kind.
    """

    def __init__(self, model: Any, otherwise: Callable[..., Any] | None = None) -> None:
        self.model, self.otherwise = model, otherwise or model
        self._step: Step | None = None
        self._refused = not can_be_captured(model)

    @property
    def replays(self) -> bool:
        """Whether the last step was replayed."""
        return self._step is not None and not self._refused

    def __call__(self, **inputs: Any) -> Any:
        """Return what the model does; logits are overwritten by the next step."""
        name = next((name for name in CACHE_NAMES if inputs.get(name) is not None), "")
        cache = inputs.get(name)
        if not isinstance(cache, LatentCache):
            return self.otherwise(**inputs)
        if self._refused or not fits(inputs, cache):
            return self.model(**inputs)
        try:
            logits = self._replayed(name, cache, inputs)
        except RuntimeError as error:
            self._refused = True
            logger.warning_once(f"steps are not replayed from a CUDA graph: {error}")
            logits = None
        if logits is None:
            return self.model(**inputs)
        output = CausalLMOutputWithPast(logits=logits)
        output[OUTPUT_CACHE] = cache
        return output

    def _replayed(self, name: str, cache: LatentCache, inputs: dict[str, Any]) -> Tensor | None:
        """Return the logits of a step [b, 1, vocabulary], None where it must be called."""
        mask = inputs.get(MASK)
        masked = mask is not None and not bool(mask.all())
        step = self._step
        if step is None or step.cache is not cache:
            step = Step(self.model, name, cache)
        place = step.prepare(inputs, masked)
        self._step = step if place else None
        return step.run(inputs, place) if place else None


class Step:
    """A step of decoding with one cache.

    Args:
        model: whose step it is.
        name: what the model calls a cache.
        cache: with a prompt in it.
    """

    def __init__(self, model: Any, name: str, cache: LatentCache) -> None:
        self.model, self.name, self.cache = model, name, cache
        self.counted = CountedCache(cache)
        self._replay: Callable[[], Any] | None = None
        self._given: dict[str, Tensor] = {}
        self._logits: Tensor | None = None

    def prepare(self, inputs: dict[str, Any], masked: bool) -> Place | None:
        """Return where a token goes, after making room for it; None where that is not said.

        What was captured is forgotten if memory or shapes are others now.
        """
        tokens, moves = self.cache.get_seq_length() + 1, self.counted.moves
        place = self.counted.place() or self.counted.make_room()
        if place is None:
            return None
        if self.counted.moves > moves or not self._fit(inputs, tokens if masked else 0):
            self._given = _buffers(inputs, tokens * MASK_GROWTH if masked else 1)
            self._replay, self.counted.counts.masked = None, masked
        return place

    def _fit(self, inputs: dict[str, Any], masked_tokens: int) -> bool:
        """Whether what is captured takes inputs of these shapes, and a mask of so many tokens."""
        given, positions = self._given, inputs.get(POSITIONS)
        return (
            given[IDS].shape == inputs[IDS].shape
            and given[POSITIONS].shape == inputs[IDS if positions is None else POSITIONS].shape
            and self.counted.counts.masked == bool(masked_tokens)
            and given[MASK].shape[-1] >= masked_tokens
        )

    def run(self, inputs: dict[str, Any], place: Place) -> Tensor:
        """Store a token in its place and return its logits [b, 1, vocabulary]."""
        self.counted.counts.refresh(place)
        self._take(inputs)
        if self._replay is None and self._logits is not None:
            self._replay = CAPTURES[inputs[IDS].device.type](self._call)
        (self._replay or self._call)()
        self.counted.advance()
        if self._logits is None:
            raise RuntimeError("the model returned no logits")
        return self._logits

    def _call(self) -> None:
        given: dict[str, Any] = {self.name: self.counted, "use_cache": True, "return_dict": True}
        self._logits = self.model(**self._given, **given).logits

    def _take(self, inputs: dict[str, Any]) -> None:
        """Copy what a step is given to where the graph reads it."""
        tokens, positions = self.cache.get_seq_length(), inputs.get(POSITIONS)
        self._given[IDS].copy_(inputs[IDS])
        if positions is None:
            self._given[POSITIONS].fill_(tokens)
        else:
            self._given[POSITIONS].copy_(positions)
        if self.counted.counts.masked:
            self._given[MASK][:, 0, 0, : tokens + 1] = inputs[MASK] != 0


def _buffers(inputs: dict[str, Any], masked: int) -> dict[str, Tensor]:
    """Return what the model is given while it is captured, with a mask of so many tokens."""
    ids, positions = inputs[IDS], inputs.get(POSITIONS)
    return {
        IDS: torch.empty_like(ids),
        POSITIONS: torch.empty_like(ids if positions is None else positions),
        MASK: torch.zeros(len(ids), 1, 1, masked, dtype=torch.bool, device=ids.device),
    }


def can_be_captured(model: Any) -> bool:
    """Whether a step of a model is nothing but kernels on one device that a graph may hold."""
    first = next(model.parameters())
    return (
        first.device.type in CAPTURES
        and first.dtype in HALVES
        and all(x.device == first.device for x in model.parameters())
        and model.config._attn_implementation == ATTENTION
        and not model.training
        and not any(_is_hooked(module) for module in model.modules())
    )


def _is_hooked(module: nn.Module) -> bool:
    """Whether somebody wants to see each call of a module."""
    before = set(module._forward_pre_hooks.values()) - {with_own_cache}
    return bool(before or module._forward_hooks)


def fits(inputs: dict[str, Any], cache: LatentCache) -> bool:
    """Whether a step is given what a graph knows: a token for each sequence, behind others."""
    ids, mask, tokens = inputs.get(IDS), inputs.get(MASK), cache.get_seq_length() + 1
    others = (value for key, value in inputs.items() if key not in KNOWN)
    return (
        ids is not None
        and ids.shape[1] == 1
        and ids.device.type in CAPTURES
        and tokens > 1
        and not torch.is_grad_enabled()
        and not cache.offloading
        and not any(value is not None and value is not False for value in others)
        and (mask is None or tuple(mask.shape) == (len(ids), tokens))
    )
