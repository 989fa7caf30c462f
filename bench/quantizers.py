"""What each quantiser costs, by part of the cache, bits and rotation: where the defaults come from.

    VDCOMPRESS_STANDINS=... python bench/quantizers.py pythia-70m-standin --windows 24

Each row packs one part of the cache and leaves the others in 16 bits: the original's heads, or
latents that all heads share. Everything is measured through the packed cache, beside the same
layout with nothing packed. The divergence from the base is the figure to compare rows by: it is
far less noisy than a perplexity of a few windows. Defaults are chosen on text held out of the
training text; ``--measure`` takes books and documents that nothing was chosen on. Rows that are
there already are kept.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import record
import standins
import token_sets
from torch import Tensor

from vdcompress.bits import SINKS, WINDOW, behind_rope
from vdcompress.calibrate import calibrate
from vdcompress.evaluate import evaluate
from vdcompress.load import Base, load
from vdcompress.modeling.layout import LayerLayout
from vdcompress.modeling.schemes import SCHEMES
from vdcompress.plan import ModelShape, Plan, Start, make_plan
from vdcompress.rewrite import needed_statistics, rewrite
from vdcompress.statistics import Statistics

MEASURED = ("books_dev", "docs_dev")
SHARED = {
    "pythia-70m-standin": {"v_dim": 320, "k_dim": 320, "k_rotary_dim": 128, "groups": 1},
    "llama-32m-standin": {"v_dim": 96, "k_dim": 96, "groups": 1},
}
START = Start("fisher", refit="none", alternate=0)


@dataclass(frozen=True)
class Setting:
    """One row: which part of which latents is packed, and how; some tokens stay exact."""

    latents: str
    part: str
    quantizer: str
    bits: int
    rotate: bool
    exact: bool

    @property
    def name(self) -> str:
        """Return what tells it from all others."""
        turned = "rotated" if self.rotate else "plain"
        tokens = f"s{SINKS} w{WINDOW}" if self.exact else "s0 w0"
        return f"{self.latents} {self.part} {self.quantizer} {self.bits} {turned} {tokens}"


def settings(latents: str, layer: LayerLayout) -> Iterator[Setting]:
    """Yield what is tried of one kind of latents."""
    for part in ("v", "k_nope", "k_rotary"):
        if not getattr(layer, part).width:
            continue
        for scheme in SCHEMES.values():
            for bits in scheme.bits:
                for rotate, exact in itertools.product((False, True), repeat=2):
                    if bits < 8 or not (rotate or exact):
                        yield Setting(latents, part, scheme.name, bits, rotate, exact)


def plan_of(whole: Plan, setting: Setting | None) -> Plan:
    """Return a plan with one part packed."""
    if setting is None:
        return whole
    start = replace(whole.start, rotate=setting.rotate)
    layers = []
    for layer in whole.layers:
        part = getattr(layer, setting.part)
        packed = replace(part, bits=setting.bits, quantizer=setting.quantizer)
        layers.append(replace(layer, **{setting.part: packed}))
    sinks, window = (SINKS, WINDOW) if setting.exact else (0, 0)
    return replace(whole, layers=tuple(layers), start=start, sinks=sinks, window=window)


def wholes(shape: ModelShape, model: str) -> dict[str, Plan]:
    """Return the layouts whose parts are packed."""
    full = make_plan(shape, v_dim=shape.kv_dim, start=START)
    found = {"heads": full, "shared": make_plan(shape, **SHARED[model], start=START)}
    if shape.rotary_dim == shape.head_dim:
        layers = tuple(behind_rope(layer) for layer in full.layers)
        found["heads behind RoPE"] = replace(full, layers=layers)
    return found


def measured(
    base: Base, plan: Plan, statistics: Statistics, texts: dict[str, Tensor], windows: int
) -> dict[str, Any]:
    """Return one row's figures."""
    begun = time.perf_counter()
    model = rewrite(base, plan, statistics)
    found = {
        name: evaluate(model, ids, base=base.model, windows=windows) for name, ids in texts.items()
    }
    return {
        "bytes_per_token": plan.bytes_per_token,
        "texts": {
            name: {"perplexity": q.perplexity, "ratio": q.ratio, "kl": q.kl, "tokens": q.tokens}
            for name, q in found.items()
        },
        "seconds": time.perf_counter() - begun,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=tuple(SHARED))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--measure", action="store_true", help="on books_dev and docs_dev")
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--only", default="", help="words that a row's name must hold")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    base = load(standins.model(options.model), device=options.device)
    sets = token_sets.read()
    texts = {text: sets[text] for text in (MEASURED if options.measure else token_sets.HELD_OUT)}
    name = f"quantizers-{'measured' if options.measure else 'chosen'}-{options.model}"
    body: dict[str, Any] = {
        "model": options.model,
        "windows": options.windows,
        "samples": options.samples,
        "rows": record.earlier_rows(name, out=options.out),
    }
    plans = wholes(base.shape, options.model)
    needs = frozenset({"values", "keys"}).union(
        *(needed_statistics(plan.start, base.shape, plan) for plan in plans.values())
    )
    windows = sets[token_sets.CALIBRATION][: options.samples]
    statistics = calibrate(base, windows, needs=needs)
    for latents, whole in plans.items():
        tried: list[Setting | None] = [None, *settings(latents, whole.layers[0])]
        for setting in tried:
            row = f"{latents} exact" if setting is None else setting.name
            done = {entry["row"] for entry in body["rows"]}
            if row in done or not all(word in row for word in options.only.split()):
                continue
            found = measured(base, plan_of(whole, setting), statistics, texts, options.windows)
            body["rows"].append({"row": row, **found})
            print(
                f"{row:40} {found['bytes_per_token']:6}",
                *(f"{q['perplexity']:.2f} {q['kl']:.5f}" for q in found["texts"].values()),
                f"{found['seconds']:.0f} s",
                flush=True,
            )
            record.write(name, body, out=options.out)


if __name__ == "__main__":
    main()
