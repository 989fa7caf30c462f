"""Store what the slow tests compare with: perplexity over the first two windows of one text.

    VDCOMPRESS_STANDINS=... python bench/two_windows.py

For each stand-in the uncompressed model, the SVD start (which needs no data), the default start of
V and keys and values in one latent for all heads, from the same few calibration windows.
"""

from __future__ import annotations

from typing import Any

import record
import standins
from torch import Tensor
from training_free import calibration_windows, evaluation_tokens
from transformers import PreTrainedModel

from vdcompress.calibrate import EVERYTHING, calibrate
from vdcompress.evaluate import evaluate
from vdcompress.gains import gains
from vdcompress.load import Base, load
from vdcompress.plan import Start, make_plan, plan_for
from vdcompress.repair import repair
from vdcompress.request import Request
from vdcompress.rewrite import rewrite
from vdcompress.statistics import Statistics

TEXT = "docs_dev"
WINDOWS, SAMPLES = 2, 2
WIDTHS = {"pythia-70m-standin": 320, "llama-32m-standin": 80}
SHARED = {"pythia-70m-standin": 192, "llama-32m-standin": 80}
STARTS = {"svd": Start("svd", "none", 0), "optimal": Start()}


def measured(name: str) -> dict[str, Any]:
    """Return the base's figures and those of each start, for one stand-in."""
    base = load(standins.model(name))
    ids = evaluation_tokens(base, TEXT, WINDOWS)
    windows = calibration_windows(base, SAMPLES, 0)
    statistics = calibrate(base, windows, needs=EVERYTHING)
    found: dict[str, Any] = {"v_dim": WIDTHS[name], "base": perplexity(base.model, ids)}
    for label, start in STARTS.items():
        plan = make_plan(base.shape, v_dim=WIDTHS[name], start=start)
        model = rewrite(base, plan, statistics)
        found[label] = perplexity(model, ids)
        found["parameters"] = sum(p.numel() for p in model.parameters())
    model = shared(base, windows, statistics, SHARED[name])
    return found | {"shared": perplexity(model, ids)}


def shared(base: Base, windows: Tensor, statistics: Statistics, width: int) -> PreTrainedModel:
    """Return the model with K and V in one latent each, repaired."""
    request = Request.of(v_dim=width, k_dim=width, groups=1)
    start = Start("fisher", "local", 0)
    plan = plan_for(base.shape, request, start, gains(base.shape, statistics))
    return repair(base, rewrite(base, plan, statistics), plan, windows)


def perplexity(model: PreTrainedModel, ids: Tensor) -> float:
    return evaluate(model, ids, windows=WINDOWS).perplexity


def main() -> None:
    models = {name: measured(name) for name in WIDTHS}
    print(record.write("two-windows", {"text": TEXT, "samples": SAMPLES, "models": models}))


if __name__ == "__main__":
    main()
