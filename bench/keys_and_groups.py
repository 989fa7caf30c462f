"""Perplexity without any training when K is compressed too, latents are shared, or bytes are spent.

    VDCOMPRESS_STANDINS=... python bench/keys_and_groups.py pythia-70m-standin --device cuda

One calibration on the training text, then one row for each request and start. The three texts that
measure are never calibrated on, and choices are made on the two held-out ones.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import perplexity
import record
import standins
import token_sets

from vdcompress.allocate import predicted_loss
from vdcompress.calibrate import EVERYTHING, calibrate
from vdcompress.cost import with_cheaper_maps, with_maps
from vdcompress.gains import gains
from vdcompress.load import load
from vdcompress.plan import Plan, Start, plan_for
from vdcompress.request import Request

FISHER = Start("fisher", "local", 4)
TEXTBOOK = (
    Start("random", "none", 0),
    Start("svd", "none", 0),
    Start("pca", "none", 0),
    Start("optimal", "none", 0),
    Start("fisher", "none", 0),
)
OURS = (FISHER,)
REPAIRS = (Start("pca", "local", 4), Start("fisher", "none", 4), Start("fisher", "local", 0))
EVERY = (*TEXTBOOK, *REPAIRS, *OURS)
RIVALS = (Start("svd", "none", 0), Start("pca", "none", 0), Start("pca", "local", 4), *OURS)

Asked = dict[str, Any]
PYTHIA: tuple[tuple[Asked, tuple[Start, ...]], ...] = (
    ({"v_dim": 320}, (Start("optimal", "local", 2), *OURS)),
    ({"v_dim": 320, "allocation": "layers"}, (Start("optimal", "local", 2), *OURS)),
    ({"k_dim": 320}, EVERY),
    ({"v_dim": 320, "k_dim": 320}, EVERY),
    ({"v_dim": 320, "k_dim": 320, "allocation": "layers"}, EVERY),
    ({"v_dim": 256, "k_dim": 256}, OURS),
    ({"v_dim": 256, "k_dim": 256, "allocation": "layers"}, OURS),
    ({"v_dim": 320, "groups": 1}, EVERY),
    ({"v_dim": 320, "groups": 1, "allocation": "layers"}, OURS),
    ({"v_dim": 256, "groups": 1}, OURS),
    ({"v_dim": 192, "groups": 1}, OURS),
    ({"v_dim": 128, "groups": 1}, OURS),
    ({"k_dim": 256, "groups": 1}, OURS),
    ({"k_dim": 192, "groups": 1}, OURS),
    ({"k_dim": 192, "k_rotary_dim": 64, "groups": 1}, OURS),
    ({"k_dim": 192, "k_rotary_dim": 96, "groups": 1}, OURS),
    ({"v_dim": 192, "k_dim": 192, "groups": 1}, EVERY),
    ({"v_dim": 192, "k_dim": 192, "groups": 1, "allocation": "layers"}, OURS),
    ({"v_dim": 256, "k_dim": 256, "groups": 2}, EVERY),
    ({"v_dim": 256, "k_dim": 256, "groups": 4}, OURS),
    ({"v_dim": 128, "k_dim": 128, "groups": 1}, OURS),
    ({"kv_budget": 0.75}, OURS),
    ({"kv_budget": 0.5}, EVERY),
    ({"kv_budget": 0.5, "allocation": "uniform"}, OURS),
    ({"kv_budget": 0.5, "groups": 8}, OURS),
    ({"kv_budget": 0.5, "target": "vllm"}, OURS),
    ({"kv_budget": 0.375}, OURS),
    ({"kv_budget": 0.25}, OURS),
)
LLAMA: tuple[tuple[Asked, tuple[Start, ...]], ...] = (
    *(
        (dict.fromkeys(sides, width) | groups, RIVALS)
        for sides in (("v_dim",), ("k_dim",), ("v_dim", "k_dim"))
        for width in (80, 64)
        for groups in ({}, {"groups": 1})
    ),
    ({"kv_budget": 0.625}, OURS),
    ({"kv_budget": 0.5}, OURS),
)
MODELS = {"pythia-70m-standin": PYTHIA, "llama-32m-standin": LLAMA}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=sorted(MODELS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--windows", type=int, default=token_sets.WINDOWS)
    parser.add_argument("--calibration", default=token_sets.CALIBRATION)
    parser.add_argument("--only", help="keep the requests whose words hold this")
    parser.add_argument("--name")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    base = load(standins.model(options.model), device=options.device)
    sets = token_sets.read()
    windows = sets[options.calibration]
    started = time.perf_counter()
    statistics = calibrate(base, windows, needs=EVERYTHING)
    found = gains(base.shape, statistics)
    body: dict[str, Any] = {
        "model": options.model,
        "windows": options.windows,
        "calibration": {
            "data": "train.jsonl.gz",
            "set": options.calibration,
            "samples": len(windows),
            "seq_len": windows.shape[1],
            "balance": token_sets.BALANCE,
            "seconds": time.perf_counter() - started,
        },
        "base": perplexity.measure_all(base, None, sets, options.windows),
        "rows": [],
    }
    for asked, starts in MODELS[options.model]:
        if options.only and options.only not in str(asked):
            continue
        request = Request.of(**asked)
        for start, maps in every_way(starts):
            plan = with_maps_of(plan_for(base.shape, request, start, found), maps)
            if plan is None:
                continue
            model = perplexity.compress(base, plan, statistics, windows)
            losses = predicted_loss(plan.layers, found)
            row = {
                "asked": asked,
                **vars(start),
                "maps": maps,
                "bytes_per_token": plan.bytes_per_token,
                "reduction": plan.reduction,
                "layers": [
                    [la.v_groups, la.v_head_dim, la.k_groups, la.k_rotary.width, la.k_nope.width]
                    for la in plan.layers
                ],
                "predicted": {p: sum(layer[p] for layer in losses) for p in losses[0]},
                "texts": perplexity.measure_all(base, model, sets, options.windows),
            }
            body["rows"].append(row)
            total = sum(row["predicted"].values())
            words = f"{start.initializer} {start.refit} {start.alternate} {maps}"
            print(asked, words, perplexity.line(row["texts"]), f"{total:.4f}", flush=True)
            path = record.write(
                options.name or f"keys-and-groups-{options.model}", body, out=options.out
            )
    print(path)


def every_way(starts: tuple[Start, ...]) -> Iterator[tuple[Start, str]]:
    """Yield every start with folded maps, and the chosen one with maps per head too."""
    for start in starts:
        yield start, "folded"
        if start == FISHER:
            yield start, "per_head"


def with_maps_of(plan: Plan, maps: str) -> Plan | None:
    """Return a plan with folded maps, or with maps per head where those are cheaper."""
    folded = replace(plan, layers=tuple(with_maps(layer, "folded") for layer in plan.layers))
    if maps == "folded":
        return folded
    cheaper = tuple(with_cheaper_maps(layer, plan.shape) for layer in plan.layers)
    return None if cheaper == folded.layers else replace(plan, layers=cheaper)


if __name__ == "__main__":
    main()
