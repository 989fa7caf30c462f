"""Widths and bits from one budget, beside bits alone: the frontier.

    VDCOMPRESS_STANDINS=... python bench/bits_frontier.py pythia-70m-standin

One calibration, nothing trained. ``--kv-budget B --bits auto`` chooses groups, widths and bits of
every layer and part; the rivals are the original's heads in few bits: our own quantisers in their
basis, and KIVI's scheme (arXiv 2402.02750: keys per channel over 32 tokens, values per token, in
the original's basis; reimplemented here for measurement). Latents are rounded as the packed cache
stores them, without keeping it; ``--through-cache`` writes and reads the cache itself, for the same
figures in more time. Bytes are those of 2048 tokens, scales, zero points and exact tokens counted.
Repaired rows are what ``apply`` makes by default, the others leave the output projections as they
are. A row is saved as soon as it is there; what the file has is not made again.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import perplexity
import record
import standins
import token_sets
from keys_and_groups import FISHER

from vdcompress.allocate import predicted_loss
from vdcompress.calibrate import EVERYTHING, calibrate
from vdcompress.evaluate import evaluate
from vdcompress.gains import gains
from vdcompress.load import Base, load
from vdcompress.plan import Plan, Start, plan_for
from vdcompress.request import Request

MEASURED = ("books_dev", "docs_dev")
BUDGETS = (0.19, 0.25, 0.105, 0.145, 0.33, 0.072, 0.5, 0.4, 0.6, 0.31)
REPAIRED = (0.33, 0.25, 0.19, 0.145, 0.135, 0.105, 0.072)
KIVI_BITS = (4, 3, 2)
PLAIN = Start("optimal", "none", 0, rotate=False)
START = replace(FISHER, refit="none", alternate=0)


@dataclass(frozen=True)
class Row:
    """One cache: its name and what makes its plan from gains."""

    name: str
    make: Any


def rows(base: Base) -> Iterator[Row]:
    """Yield ours, then the rivals."""
    for budget in BUDGETS:
        asked = Request(kv_budget=budget, bits="auto")
        yield Row(f"--kv-budget {budget} --bits auto", partial(plan_for, base.shape, asked, START))
    for budget in REPAIRED:
        asked = Request(kv_budget=budget, bits="auto")
        name = f"--kv-budget {budget} --bits auto, repaired"
        yield Row(name, partial(plan_for, base.shape, asked, FISHER))
    for bits in (8, 4, 3):
        asked = Request(bits=bits)
        yield Row(
            f"--bits {bits}", partial(plan_for, base.shape, asked, Start("fisher", "none", 0))
        )
    for bits in KIVI_BITS:
        yield Row(f"KIVI int{bits}", partial(kivi, base, bits))


def kivi(base: Base, bits: int, _gains: Any) -> Plan:
    """Return the plan of KIVI's scheme: full heads, nothing turned, keys per channel."""
    plan = plan_for(base.shape, Request(bits=bits, k_rotary_bits=_rotary(base, bits)), PLAIN)
    layers = []
    for layer in plan.layers:
        nope, turned = (
            replace(part, quantizer="per_channel") if part.packed else part
            for part in (layer.k_nope, layer.k_rotary)
        )
        values = replace(layer.v, quantizer="per_token")
        layers.append(replace(layer, v=values, k_nope=nope, k_rotary=turned))
    return replace(plan, layers=tuple(layers))


def _rotary(base: Base, bits: int) -> int | None:
    return None if base.shape.rotary_dim == base.shape.head_dim else bits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=("llama-32m-standin", "pythia-70m-standin"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--windows", type=int, default=token_sets.WINDOWS)
    parser.add_argument("--through-cache", action="store_true")
    parser.add_argument("--only", default="", help="keep the rows whose names hold this")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    base = load(standins.model(options.model), device=options.device)
    sets = token_sets.read()
    texts = {name: sets[name] for name in MEASURED}
    name = f"bits-frontier-{options.model}"
    windows = sets[token_sets.CALIBRATION]
    statistics = calibrate(base, windows, needs=EVERYTHING)
    found = gains(base.shape, statistics)
    body: dict[str, Any] = {"model": options.model, "windows": options.windows}
    body["rows"] = record.earlier_rows(name, out=options.out)
    there = {row["name"] for row in body["rows"]}
    if "uncompressed" not in there:
        body["rows"].append({"name": "uncompressed", **measured(base.model, texts, options)})
        body["rows"][-1]["bytes_per_token"] = 4 * base.shape.layers * base.shape.kv_dim
    for row in rows(base):
        if row.name in there or options.only not in row.name:
            continue
        plan = row.make(found)
        model = perplexity.compress(base, plan, statistics, windows)
        lost = predicted_loss(plan.layers, found)
        made = {
            "name": row.name,
            "bytes_per_token": plan.bytes_per_token,
            "reduction": plan.reduction,
            "predicted": sum(sum(layer.values()) for layer in lost),
            "layers": [layer.to_json() for layer in plan.layers],
            **measured(model, texts, options),
            "environment": record.environment(),
        }
        body["rows"].append(made)
        figures = " / ".join(f"{text['perplexity']:.3f}" for text in made["texts"].values())
        print(row.name, plan.bytes_per_token, figures, f"{made['predicted']:.5f}", flush=True)
        record.write(name, body, out=options.out)


def measured(model: Any, texts: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Return the perplexity of each text."""
    way = {"windows": options.windows, "through_cache": options.through_cache}
    found = {name: evaluate(model, ids, **way) for name, ids in texts.items()}
    return {
        "through_cache": options.through_cache,
        "texts": {
            name: {"perplexity": q.perplexity, "tokens": q.tokens} for name, q in found.items()
        },
    }


if __name__ == "__main__":
    main()
