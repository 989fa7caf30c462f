"""Every verb on its own: load, calibrate, make_plan, rewrite, evaluate, heal, evaluate, export.

python examples/step_by_step.py [FOLDER] [--quick]

FOLDER is where the result goes, exports/step-by-step if left out; an older one is replaced.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import vdcompress
from vdcompress.data.corpus import Source, documents
from vdcompress.data.windows import draw_windows, tokenise
from vdcompress.evaluate import Evaluation
from vdcompress.rounding import round_weights

WINDOW = 256


def main(folder: Path, quick: bool) -> None:
    base = vdcompress.load("demo")

    # Text has one of three roles, so nothing is measured on what calibrated or trained.
    stdlib = Source.parse("stdlib")
    count = 8 if quick else 96
    training, validation = (
        draw_windows(documents(stdlib, role), base.tokenizer, count=n, length=WINDOW, seed=0)
        for role, n in (("training", count), ("validation", count // 4))
    )
    held_out = tokenise(
        documents(stdlib, "evaluation"), base.tokenizer, limit=count // 4 * WINDOW + 1
    )

    statistics = vdcompress.calibrate(base, training)
    plan = vdcompress.make_plan(base.shape, v_dim=96)  # 4 heads of 24, from 64
    model = vdcompress.rewrite(base, plan, statistics)

    def measure() -> Evaluation:
        return vdcompress.evaluate(
            model, held_out, base=base.model, window=WINDOW, windows=count // 4
        )

    compressed = measure()
    settings = vdcompress.HealSettings(epochs=1, batch_size=8, learning_rate=3e-4)
    with tempfile.TemporaryDirectory() as checkpoints:
        done = vdcompress.heal(
            model, base.model, training, validation, settings, checkpoints=Path(checkpoints)
        )
    round_weights(model, base.dtype)  # measure what will be saved
    healed = measure()

    print(f"{'':12}{'bytes per token':>16}{'perplexity':>12}{'KL to base':>12}")
    print(f"{'base':12}{plan.base_bytes_per_token:>16,}{compressed.base_perplexity:>12.3f}{0:>12}")
    for name, found in (("compressed", compressed), ("healed", healed)):
        figures = f"{plan.bytes_per_token:>16,}{found.perplexity:>12.3f}{found.kl:>12.4f}"
        print(f"{name:12}{figures}")
    print(f"the weights are those of epoch {done.best_epoch} of {len(done.history)}")

    finished = vdcompress.Compressed.of(base, plan, model)
    seen = vdcompress.export(finished, folder, force=True)
    print(f"{seen.folder} loads without vdcompress, logits within {seen.logit_difference:.1g}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", type=Path, default=Path("exports/step-by-step"))
    parser.add_argument("--quick", action="store_true", help="less text, to see that it runs")
    given = parser.parse_args()
    main(given.folder, given.quick)
