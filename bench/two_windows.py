"""Store what the slow tests compare with: perplexity over the first two windows of one text.

    VDCOMPRESS_STANDINS=... python bench/two_windows.py

For each stand-in the uncompressed model, the SVD start (which needs no data) and the default start
from 16 calibration windows.
"""

from __future__ import annotations

from typing import Any

import record
import standins
from training_free import calibration_windows, evaluation_tokens

from vdcompress.calibrate import calibrate
from vdcompress.evaluate import evaluate
from vdcompress.load import load
from vdcompress.plan import Start, make_plan
from vdcompress.rewrite import rewrite

TEXT = "docs_dev"
WINDOWS, SAMPLES = 2, 16
WIDTHS = {"pythia-70m-standin": 320, "llama-32m-standin": 80}
STARTS = {"svd": Start("svd", "none", 0), "optimal": Start()}


def measured(name: str) -> dict[str, Any]:
    """Return the base's figures and those of each start, for one stand-in."""
    base = load(standins.model(name))
    ids = evaluation_tokens(base, TEXT, WINDOWS)
    statistics = calibrate(base, calibration_windows(base, SAMPLES, 0))
    found: dict[str, Any] = {"v_dim": WIDTHS[name]}
    for label, start in STARTS.items():
        plan = make_plan(base.shape, v_dim=WIDTHS[name], start=start)
        model = rewrite(base, plan, statistics)
        evaluation = evaluate(model, ids, base=base.model, windows=WINDOWS)
        found["base"] = evaluation.base_perplexity
        found[label] = evaluation.perplexity
        found["parameters"] = sum(p.numel() for p in model.parameters())
    return found


def main() -> None:
    models = {name: measured(name) for name in WIDTHS}
    print(record.write("two-windows", {"text": TEXT, "samples": SAMPLES, "models": models}))


if __name__ == "__main__":
    main()
