"""Spend half of the cache's bytes where they count: calibrate, plan by gains, rewrite, repair.

python examples/half_the_cache.py [--quick]

The same in one call is ``vdcompress.compress("demo", kv_budget=0.5)``.
"""

from __future__ import annotations

import argparse

import vdcompress as vd
from vdcompress.calibrate import EVERYTHING
from vdcompress.data.corpus import Source, documents
from vdcompress.data.windows import draw_windows, tokenise
from vdcompress.gains import gains


def main(quick: bool) -> None:
    base = vd.load("demo")
    text = Source.parse("stdlib")
    windows = draw_windows(
        documents(text, "training"), base.tokenizer, count=8 if quick else 32, length=256, seed=0
    )
    tokens = tokenise(documents(text, "evaluation"), base.tokenizer, limit=2049)

    statistics = vd.calibrate(base, windows, needs=EVERYTHING)
    found = gains(base.shape, statistics)
    start = vd.Start("fisher", refit="local", alternate=0)
    for share in (0.75, 0.5, 0.25):
        plan = vd.plan_for(base.shape, vd.Request(kv_budget=share), start, found)
        model = vd.repair(base, vd.rewrite(base, plan, statistics), plan, windows)
        quality = vd.evaluate(model, tokens, base=base.model, window=512)
        widths = [(layer.v_dim, layer.k_dim) for layer in plan.layers]
        print(f"{plan.bytes_per_token} bytes per token, V and K by layer {widths}:")
        print(f"  perplexity {quality.base_perplexity:.3f} -> {quality.perplexity:.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="less text, to see that it runs")
    main(parser.parse_args().quick)
