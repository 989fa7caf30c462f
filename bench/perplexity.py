"""One figure of one model on one text, as every bench writes it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import token_sets

from vdcompress.evaluate import evaluate
from vdcompress.repair import needs_repair, repair
from vdcompress.rewrite import rewrite

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from vdcompress.load import Base
    from vdcompress.plan import Plan
    from vdcompress.statistics import Statistics


def measure(
    base: Base, model: Any, ids: torch.Tensor, windows: int = token_sets.WINDOWS
) -> dict[str, Any]:
    """Return perplexity of the model (of the base if None), ratio and KL on one text.

    Packed latents are rounded as their cache would, without keeping one: the same numbers.
    """
    batch = 4 if base.model.device.type == "cuda" else 1
    if model is None:
        found = evaluate(base.model, ids, windows=windows, batch=batch)
    else:
        found = evaluate(
            model, ids, base=base.model, windows=windows, batch=batch, through_cache=False
        )
    return {
        "perplexity": found.perplexity,
        "ratio": found.ratio,
        "kl": found.kl,
        "tokens": found.tokens,
    }


def measure_all(
    base: Base, model: Any, sets: dict[str, torch.Tensor], windows: int = token_sets.WINDOWS
) -> dict[str, Any]:
    """Measure on the three texts and on the two that choices are made by."""
    return {name: measure(base, model, sets[name], windows) for name in token_sets.MEASURED}


def compress(
    base: Base, plan: Plan, statistics: Statistics, windows: torch.Tensor
) -> PreTrainedModel:
    """Rewrite and repair as the product does."""
    model = rewrite(base, plan, statistics)
    if needs_repair(plan):
        batch = 4 if base.model.device.type == "cuda" else 1
        repair(base, model, plan, windows, batch=batch)
    return model


def line(texts: dict[str, Any]) -> str:
    """Return a row's figures for the eye."""
    figures = " / ".join(f"{found['perplexity']:.2f}" for found in texts.values())
    divergences = (texts[name]["kl"] for name in token_sets.HELD_OUT)
    return f"{figures} kl {' '.join('-' if kl is None else f'{kl:.4f}' for kl in divergences)}"
