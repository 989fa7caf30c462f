"""Decoding on a CPU: attention alone, and whole steps of a model, behind a long context.

    VDCOMPRESS_STANDINS=... python bench/decode_cpu.py --threads 2

All that are compared take turns within one process, and a ratio is the median over rounds of a
quotient of one round; rounds that other processes disturbed are repeated. Caches hold random
numbers, written through their own ``update()``. The base of attention alone is torch's scaled dot
product attention over 64/64, on pages as torch asks for them and on large ones as our caches do; of
a whole model, the base with each of transformers' plain caches.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import record
import standins
import torch
from quiet import quiet_rounds
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from vdcompress.cache_kinds import DYNAMIC, OWN, STATIC
from vdcompress.calibrate import calibrate
from vdcompress.decode_speed import Contender, decode
from vdcompress.load import Base, load
from vdcompress.modeling import large_pages
from vdcompress.modeling.attention import latent_attention
from vdcompress.modeling.cache import GrowingLayer
from vdcompress.modeling.packed_cache import PackedLayer
from vdcompress.plan import ModelShape, Plan, make_plan
from vdcompress.rewrite import needed_statistics, rewrite
from vdcompress.speed_rounds import Outcome, median_speed, ratios, rounds

MODEL = "pythia-70m-standin"
BASE, LARGE = "base", "base, on large pages"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
EXACT, BITS = 16, (8, 4, 3, 2)
LAYOUTS: dict[str, dict[str, Any]] = {
    "V 320, K 320": {"v_dim": 320, "k_dim": 320},
    "V 320": {"v_dim": 320},
    "V 192, K 192, one latent": {"v_dim": 192, "k_dim": 192, "groups": 1, "k_rotary_dim": 64},
}
ONLY_EXACT = "V 320"
WHOLE = (("V 320, K 320", EXACT), ("V 320", EXACT), ("V 320, K 320", 8), ("V 320, K 320", 4))
STOCK = (DYNAMIC, STATIC)
CHUNK = 4096  # tokens written into a cache at once
Call = Callable[[], Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--context", type=int, nargs="+", default=[4096, 16384, 32768])
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=list(DTYPES))
    parser.add_argument("--rounds", type=int, default=45, help="of attention alone")
    parser.add_argument("--model-rounds", type=int, default=11)
    parser.add_argument("--new-tokens", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--skip", choices=("attention", "whole"), nargs="*", default=[])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    base = load(standins.model(MODEL))
    body: dict[str, Any] = {"model": MODEL}
    body |= {part: earlier(part, options) for part in ("attention", "whole")}
    body |= {name: getattr(options, name) for name in ("rounds", "model_rounds", "new_tokens")}
    for name in options.dtype:
        for tokens in options.context:
            if "attention" not in options.skip:
                body["attention"] += attention_rows(base.shape, name, tokens, options.rounds)
    if "whole" not in options.skip:
        models = {key: compressed(base, plan_of(base.shape, *key)) for key in WHOLE}
        for name in options.dtype:
            for tokens in options.context:
                count, new = options.model_rounds, options.new_tokens
                body["whole"] += model_rows(base, models, name, tokens, count, new)
    for part in ("attention", "whole"):
        body[part].sort(key=lambda row: (-DTYPES[row["dtype"]].itemsize, row["tokens"]))
    print(record.write("decode-cpu", body, out=options.out))


def earlier(part: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the rows that are not measured again: those of a part that is skipped, or of others.

    A row is measured again if its dtype and its context are asked for.
    """
    path = (options.out or record.RESULTS) / "decode-cpu.json"
    rows = json.loads(path.read_text())[part] if path.exists() else []
    if part in options.skip:
        return list(rows)
    asked = {(dtype, tokens) for dtype in options.dtype for tokens in options.context}
    return [row for row in rows if (row["dtype"], row["tokens"]) not in asked]


def plan_of(shape: ModelShape, layout: str, bits: int) -> Plan:
    """Return the plan that ``apply`` makes of a layout in so many bits."""
    return make_plan(shape, **LAYOUTS[layout], **({} if bits == EXACT else {"bits": bits}))


def attention_rows(shape: ModelShape, dtype: str, tokens: int, count: int) -> list[dict[str, Any]]:
    """Return the times of one layer's attention over every cache, in turns."""
    calls: dict[tuple[str, int], Call] = {
        (name, EXACT): base_call(shape, DTYPES[dtype], tokens, make)
        for name, make in ((BASE, torch.empty), (LARGE, large_pages.empty))
    }
    for layout in LAYOUTS:
        for bits in (EXACT,) if layout == ONLY_EXACT else (EXACT, *BITS):
            plan = plan_of(shape, layout, bits)
            calls[layout, bits] = own_call(plan, DTYPES[dtype], tokens)
    order = list(calls)
    in_turns(calls)
    found, quiet = quiet_rounds(partial(in_turns, calls), count)
    seconds = {key: [turn[key] for turn in found] for key in sorted(calls, key=order.index)}
    rows = []
    for key, own in seconds.items():
        layout, bits = key
        row = {"layout": layout, "bits": bits, "dtype": dtype, "tokens": tokens}
        row |= {"seconds": statistics.median(own), "fastest": min(own), "quiet_rounds": quiet}
        row["base_by_own"] = quotient(seconds[BASE, EXACT], own)
        if layout not in {BASE, LARGE}:
            row["own_by_exact"] = quotient(own, seconds[layout, EXACT])
        rows.append(row)
        print(row, flush=True)
    return rows


@torch.inference_mode()
def in_turns(calls: dict[tuple[str, int], Call]) -> dict[tuple[str, int], float]:
    """Return the seconds of each call; the first one is the last of the next round.

    A call's time depends a little on the one before it, whose memory fills the caches.
    """
    seconds = {}
    for key, call in calls.items():
        start = time.perf_counter()
        call()
        seconds[key] = time.perf_counter() - start
    first = next(iter(calls))
    calls[first] = calls.pop(first)
    return seconds


def quotient(one: list[float], other: list[float]) -> float:
    """Return the median over rounds of the quotient."""
    return statistics.median(a / b for a, b in zip(one, other, strict=True))


def base_call(shape: ModelShape, dtype: torch.dtype, tokens: int, make: Any) -> Call:
    """Return torch's attention of one query over the base's keys and values, as ``make`` them."""
    heads, d = shape.kv_heads, shape.head_dim
    sizes: dict[str, Any] = {"dtype": dtype, "device": torch.device("cpu")}
    key, value = (make((1, heads, tokens, d), **sizes).normal_() for _ in range(2))
    query = torch.randn(1, heads, 1, d).to(dtype)
    return partial(scaled_dot_product_attention, query, key, value)


@torch.inference_mode()
def own_call(plan: Plan, dtype: torch.dtype, tokens: int) -> Call:
    """Return this package's attention of one query over the first layer's cache."""
    layout = plan.layers[0]
    packed = layout.packed
    cache: Any = PackedLayer(layout, plan.sinks, plan.window) if packed else GrowingLayer()
    sides = ((layout.k_groups, layout.k_head_dim), (layout.v_groups, layout.v_head_dim))
    for new in (*[CHUNK] * ((tokens - 1) // CHUNK), (tokens - 1) % CHUNK, 1):
        if new:
            found = cache.update(*(torch.randn(1, g, new, w).to(dtype) for g, w in sides))
    query = torch.randn(1, plan.shape.heads, 1, layout.k_head_dim).to(dtype)
    return partial(latent_attention, nn.Module().eval(), query, *found, None, scaling=0.125)


def compressed(base: Base, plan: Plan) -> tuple[Any, Plan]:
    """Return a model of a plan; its weights do not matter here."""
    needs = needed_statistics(plan.start, base.shape, plan)
    windows = torch.randint(base.config.vocab_size, (8, 512))
    return rewrite(base, plan, calibrate(base, windows, needs=needs)), plan


def model_rows(
    base: Base,
    models: dict[tuple[str, int], tuple[Any, Plan]],
    dtype: str,
    tokens: int,
    count: int,
    new_tokens: int,
) -> list[dict[str, Any]]:
    """Return the speeds of whole steps, in turns."""
    full = (base.shape.full_layout(),) * base.shape.layers
    stock = [Contender(kind.name, base.model, full, kind) for kind in STOCK]
    own = [
        Contender(f"{layout}: {bits}", model, plan.layers, OWN)
        for (layout, bits), (model, plan) in models.items()
    ]
    for contender in (*stock, *own):
        contender.model.to(DTYPES[dtype])
    measure = partial(decode, context=tokens, batch=1, new_tokens=new_tokens)
    turns, quiet = quiet_rounds(partial(rounds, [*stock, *own], measure, 1), count)
    found: dict[str, Outcome] = {
        contender.name: [one for turn in turns for one in turn[contender.name]]
        for contender in (*stock, *own)
    }
    rows = []
    for contender in (*stock, *own):
        passes = found[contender.name]
        layout, _, bits = contender.name.partition(": ")
        row = {"layout": layout, "bits": int(bits or EXACT), "dtype": dtype, "tokens": tokens}
        row |= {"tokens_per_second": median_speed(passes), "quiet_rounds": quiet}
        row["faster_than"] = ratios(found, contender.name, [kind.name for kind in STOCK])
        rows.append(row)
        print(row, flush=True)
    return rows


if __name__ == "__main__":
    main()
