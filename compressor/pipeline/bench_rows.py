"""The rows of a benchmark: what one model with one kind of cache did at one context and batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vdcompress.cache_kinds import DYNAMIC, STATIC
from vdcompress.speed_rounds import Outcome, median_peak, median_speed, ratios, spread

Json = dict[str, Any]
Outcomes = Mapping[str, Outcome]
PLAIN = (DYNAMIC.name, STATIC.name)  # caches that others are compared with


def skipped(reason: str, state: str = "skipped") -> Json:
    """Return a row's fields where there are no figures, and why."""
    nothing = (
        "prefill_tokens_per_second",
        "decode_tokens_per_second",
        "graph_tokens_per_second",
        "rounds",
        "spread",
        "cache_bytes",
        "allocated_bytes",
        "prefill_peak_bytes",
        "decode_peak_bytes",
    )
    missing = dict.fromkeys(nothing) | {"speedup": {}, "graph_speedup": {}}
    return {"state": state, "reason": reason} | missing


def measured(decoded: Outcomes, prompts: Outcomes, replayed: Outcomes, name: str) -> Json:
    """Return a row's figures: medians, and peaks while a prompt was read and while it decoded.

    Args:
        decoded: what came of decoding, of all that took turns.
        prompts: what came of reading a prompt.
        replayed: what came of steps in CUDA graphs; not all need to be there.
        name: whose row it is.
    """
    prompt, passes = prompts[name], decoded[name]
    if isinstance(prompt, str):
        return skipped(prompt, "failed")
    if isinstance(passes, str):
        return skipped(passes, "failed")
    graphs = replayed.get(name, "")
    return {
        "state": "done",
        "reason": None,
        "prefill_tokens_per_second": median_speed(prompt),
        "decode_tokens_per_second": median_speed(passes),
        "graph_tokens_per_second": None if isinstance(graphs, str) else median_speed(graphs),
        "rounds": [found.tokens_per_second for found in passes],
        "spread": spread(passes),
        "cache_bytes": passes[0].cache_bytes,
        "allocated_bytes": passes[0].allocated_bytes,
        "prefill_peak_bytes": median_peak(prompt),
        "decode_peak_bytes": median_peak(passes),
        "speedup": ratios(decoded, name, PLAIN),
        "graph_speedup": {} if isinstance(graphs, str) else ratios(replayed, name, PLAIN),
    }
