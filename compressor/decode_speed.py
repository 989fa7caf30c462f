"""How fast a model reads a prompt and decodes behind a long context, with one kind of cache.

Decoding is measured on a cache filled with random numbers of the right shapes, through its own
``update()``: the time of a step depends on how many tokens are cached, not on which. Steps are
plain calls of the model, not compiled, the greedy token of one being the input of the next; on CUDA
steps can also be replayed from a graph, as ``generate()`` does with a compressed model's own cache.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from vdcompress.cache_kinds import OWN, CacheKind, stored_nbytes
from vdcompress.modeling.graphed_steps import GraphedSteps
from vdcompress.modeling.layout import LayerLayout
from vdcompress.modeling.own_cache import CACHE_NAMES
from vdcompress.peak_memory import PeakMemory

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHUNK = 4096  # tokens written into a cache at once
WARM_UP = 16  # tokens of a prompt that is not timed
GRAPH_STEPS = 3  # of which the last is captured


@dataclass(frozen=True)
class Contender:
    """A model with one kind of cache.

    Attributes:
        name: of it in tables.
        model: in evaluation mode.
        layouts: what each layer's cache is given, in order.
        kind: of its cache.
    """

    name: str
    model: PreTrainedModel
    layouts: tuple[LayerLayout, ...]
    kind: CacheKind

    @property
    def weight_bytes(self) -> int:
        """Bytes of the model's parameters, shared ones once."""
        return sum(p.numel() * p.element_size() for p in self.model.parameters())


@dataclass(frozen=True)
class Pass:
    """One measurement.

    Attributes:
        tokens_per_second: over all sequences.
        cache_bytes: of the tokens cached before decoding (after it for a prompt).
        allocated_bytes: that the cache holds, spare room included.
        peak_bytes: the model's weights and the most held beside them, None where not known.
    """

    tokens_per_second: float
    cache_bytes: int
    allocated_bytes: int
    peak_bytes: int | None


@torch.inference_mode()
def prefill(contender: Contender, tokens: int, batch: int) -> Pass:
    """Measure reading a prompt of random tokens into an empty cache.

    Args:
        contender: what is measured.
        tokens: of each sequence.
        batch: sequences.
    """
    model = contender.model
    peak = PeakMemory(str(model.device))
    ids = torch.randint(model.config.vocab_size, (batch, tokens), device=model.device)
    _step(model, contender.kind.make(model.config, WARM_UP), ids[:, :WARM_UP])
    cache = contender.kind.make(model.config, tokens)
    peak.restart()
    start = _now(model)
    _step(model, cache, ids)
    seconds = _now(model) - start
    sizes = stored_nbytes(cache, tokens)
    return Pass(batch * tokens / seconds, *sizes, _peak(contender, peak))


@torch.inference_mode()
def decode(contender: Contender, context: int, batch: int, new_tokens: int) -> Pass:
    """Measure decoding behind a cache that was filled with random numbers.

    Args:
        contender: what is measured.
        context: tokens in the cache at the start.
        batch: sequences.
        new_tokens: steps that are timed, after one that is not.
    """
    model = contender.model
    peak = PeakMemory(str(model.device))
    cache = contender.kind.make(model.config, context + new_tokens + 1)
    fill(cache, contender.layouts, context, batch, model)
    sizes = stored_nbytes(cache, context)
    peak.restart()
    ids = _step(model, cache, _first_ids(model, batch))
    start = _now(model)
    for _ in range(new_tokens):
        ids = _step(model, cache, ids)
    seconds = _now(model) - start
    return Pass(batch * new_tokens / seconds, *sizes, _peak(contender, peak))


@torch.inference_mode()
def replay(contender: Contender, context: int, batch: int, replays: int) -> Pass:
    """Measure steps of decoding that a CUDA graph holds: no launch is waited for.

    Args:
        contender: what is measured, on CUDA.
        context: tokens in the cache before the steps that warm up.
        batch: sequences.
        replays: of the step; a dynamic cache writes one token again each time, others go on.
    """
    model = contender.model
    peak = PeakMemory(str(model.device))
    cache = contender.kind.make(model.config, context + GRAPH_STEPS + replays + 1)
    fill(cache, contender.layouts, context, batch, model)
    sizes = stored_nbytes(cache, context)
    peak.restart()
    run = _replayed(contender, cache, _first_ids(model, batch))
    run()
    start = _now(model)
    for _ in range(replays):
        run()
    seconds = _now(model) - start
    return Pass(batch * replays / seconds, *sizes, _peak(contender, peak))


def _replayed(contender: Contender, cache: Any, ids: torch.Tensor) -> Callable[[], Any]:
    """Return what makes a step from a graph: the one of ``generate()`` where there is one."""
    model = contender.model
    if contender.kind is OWN:
        steps = GraphedSteps(model)
        _step(model, cache, ids)
        _step(model, cache, ids, steps)
        if steps.replays:
            return lambda: _step(model, cache, ids, steps)
    return captured(lambda: _step(model, cache, ids))


def captured(call: Callable[[], Any]) -> Callable[[], Any]:
    """Return what replays a call's work on CUDA, captured when it was made for the last time.

    It is made :data:`GRAPH_STEPS` times.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(GRAPH_STEPS - 1):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def fill(
    cache: Any,
    layouts: Sequence[LayerLayout],
    tokens: int,
    batch: int,
    model: PreTrainedModel,
) -> None:
    """Write standard normal numbers into every layer of a cache, in chunks, through ``update()``.

    Args:
        cache: an empty one.
        layouts: of the layers; keys are [batch, k_groups, t, k_head_dim], values alike.
        tokens: to write.
        batch: sequences; all hold the same numbers.
        model: whose device and dtype they have.
    """
    draw = torch.Generator(model.device).manual_seed(0)
    for index, layout in enumerate(layouts):
        sides = (
            (layout.k_groups, layout.k_head_dim),
            (layout.v_groups, layout.v_head_dim),
        )
        chunk = min(CHUNK, tokens)
        drawn = [
            torch.randn(1, groups, chunk, width, generator=draw, device=model.device)
            .to(model.dtype)
            .expand(batch, -1, -1, -1)
            for groups, width in sides
        ]
        for start in range(0, tokens, chunk):
            keys, values = (x[:, :, : tokens - start] for x in drawn)
            cache.update(keys, values, index)


def _step(model: Any, cache: Any, ids: torch.Tensor, call: Any = None) -> torch.Tensor:
    """Run the model over new tokens [b, t] and return the greedy next ones [b, 1].

    Args:
        model: that runs.
        cache: of its tokens.
        ids: new tokens.
        call: what is called in its place.
    """
    given = {"input_ids": ids, "use_cache": True, "logits_to_keep": 1, cache_argument(model): cache}
    output = (call or model)(**given)
    return output.logits[:, -1:].argmax(-1)


def cache_argument(model: Any) -> str:
    """Return what this transformers calls the cache."""
    known = inspect.signature(model.forward).parameters
    return next(name for name in CACHE_NAMES if name in known)


def _first_ids(model: PreTrainedModel, batch: int) -> torch.Tensor:
    return torch.zeros(batch, 1, dtype=torch.long, device=model.device)


def _now(model: PreTrainedModel) -> float:
    """Return the time when all work given to the device is done."""
    if model.device.type != "cpu":
        torch.accelerator.synchronize(model.device)
    return time.perf_counter()


def _peak(contender: Contender, peak: PeakMemory) -> int | None:
    above = peak.above_start()
    return None if above is None else contender.weight_bytes + above
