"""Compare the ways to start: every initialiser at equal width, bare and refitted.

python examples/compare_starts.py [--quick]

A file added to the folder of initialisers turns up in this table by itself.
"""

from __future__ import annotations

import argparse

import vdcompress
from vdcompress import initializers
from vdcompress.calibrate import EVERYTHING
from vdcompress.data.corpus import Source, documents
from vdcompress.data.windows import draw_windows, tokenise

WINDOW = 256
WIDTHS = (192, 128)


def main(quick: bool) -> None:
    base = vdcompress.load("demo")
    stdlib = Source.parse("stdlib")
    count = 8 if quick else 96
    training = draw_windows(
        documents(stdlib, "training"), base.tokenizer, count=count, length=WINDOW, seed=0
    )
    held_out = tokenise(
        documents(stdlib, "evaluation"), base.tokenizer, limit=count // 8 * WINDOW + 1
    )
    statistics = vdcompress.calibrate(base, training, needs=EVERYTHING)  # once, for all of them

    def perplexity(model: object) -> float:
        return vdcompress.evaluate(model, held_out, window=WINDOW, windows=count // 8).perplexity

    print(f"perplexity {perplexity(base.model):.3f} with all {base.shape.kv_dim} dimensions of V")
    columns = [f"{v_dim} {refit}" for v_dim in WIDTHS for refit in ("bare", "refit")]
    print(f"{'start':10}" + "".join(f"{column:>12}" for column in columns))
    for name in initializers.available():
        row = f"{name:10}"
        for v_dim in WIDTHS:
            for refit, rounds in (("none", 0), ("local", 2)):
                start = vdcompress.Start(name, refit, rounds)
                plan = vdcompress.make_plan(base.shape, v_dim=v_dim, start=start)
                row += f"{perplexity(vdcompress.rewrite(base, plan, statistics)):>12.3f}"
        print(row)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="less text, to see that it runs")
    main(parser.parse_args().quick)
