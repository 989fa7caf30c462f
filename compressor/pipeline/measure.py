"""Measure a compressed model beside its base: quality, and the cache that ``generate()`` left."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vdcompress.cache_size import CacheSize, measure_cache
from vdcompress.evaluate import Evaluation, evaluate
from vdcompress.events import OnEvent, Stopwatch
from vdcompress.modeling.layout import TYPICAL_TOKENS
from vdcompress.pipeline.document import kv_cache
from vdcompress.pipeline.text import evaluation_data
from vdcompress.plan import Plan
from vdcompress.recipe import Recipe

if TYPE_CHECKING:
    from torch import Tensor

    from vdcompress.artifact import Compressed
    from vdcompress.load import Base

PROMPT_TOKENS, NEW_TOKENS = 64, 16


@dataclass(frozen=True)
class Measured:
    """Quality and cache of one model."""

    quality: Evaluation
    cache: CacheSize

    def fields(self, plan: Plan, recipe: Recipe) -> dict[str, Any]:
        """Return the document's fields ``kv_cache``, ``perplexity`` and ``positions``."""
        found = self.quality.to_json()
        found["perplexity"]["data"] = evaluation_data(recipe)
        return {
            "kv_cache": kv_cache(plan, self.cache),
            "perplexity": found["perplexity"],
            "positions": found["positions"],
        }


def measure(
    compressed: Compressed, base: Base, tokens: Tensor, recipe: Recipe, on_event: OnEvent
) -> Measured:
    """Evaluate both models on the same tokens, then generate once.

    Args:
        compressed: the model to measure.
        base: what it is compared with.
        tokens: [n].
        recipe: its ``evaluation`` section says how.
        on_event: hears what happens.
    """
    section = recipe.evaluation
    watch = Stopwatch(on_event)
    with watch.stage("evaluate", section.windows):
        quality = evaluate(
            compressed.model,
            tokens,
            base=base.model,
            window=section.seq_len,
            windows=section.windows,
            positions=section.positions,
            on_event=on_event,
        )
    with watch.stage("cache"):
        prompt = prompt_tokens(compressed)
        cache = measure_cache(
            compressed.model,
            tokens[:prompt],
            prompt_tokens=prompt,
            new_tokens=NEW_TOKENS,
        )
    return Measured(quality, cache)


def prompt_tokens(compressed: Compressed) -> int:
    """Return how long a prompt leaves the cache that the plan's bytes per token speak of.

    A packed cache that keeps some tokens exact is measured at the length of the plan's figure, or
    as long as the model reads. The last new token is never written.
    """
    if not compressed.plan.depends_on_length:
        return PROMPT_TOKENS
    longest = getattr(compressed.model.config, "max_position_embeddings", TYPICAL_TOKENS)
    return max(1, min(TYPICAL_TOKENS, longest) - NEW_TOKENS + 1)
