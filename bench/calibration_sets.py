"""How much the calibration set matters: its size, its seed, and what it is made of.

    VDCOMPRESS_STANDINS=... python bench/calibration_sets.py pythia-70m-standin --device cuda

Each set calibrates plans of three shapes; the texts that measure are the same for all.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import perplexity
import record
import standins
import token_sets
from keys_and_groups import FISHER

from vdcompress.calibrate import EVERYTHING, calibrate
from vdcompress.gains import gains
from vdcompress.load import load
from vdcompress.plan import plan_for
from vdcompress.request import Request

ASKED: tuple[dict[str, Any], ...] = (
    {"v_dim": 320, "k_dim": 320},
    {"v_dim": 192, "k_dim": 192, "groups": 1},
    {"kv_budget": 0.5},
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=("pythia-70m-standin",))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--windows", type=int, default=token_sets.WINDOWS)
    parser.add_argument("--sets", help="names, with commas between them; all by default")
    parser.add_argument("--name", default="calibration-sets-pythia-70m-standin")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    base = load(standins.model(options.model), device=options.device)
    sets = token_sets.read()
    body: dict[str, Any] = {"model": options.model, "windows": options.windows, "rows": []}
    wanted = options.sets.split(",") if options.sets else [n for n in sets if "seed" in n]
    for name in wanted:
        windows = sets[name]
        statistics = calibrate(base, windows, needs=EVERYTHING)
        found = gains(base.shape, statistics)
        for asked in ASKED:
            plan = plan_for(base.shape, Request.of(**asked), FISHER, found)
            model = perplexity.compress(base, plan, statistics, windows)
            texts = perplexity.measure_all(base, model, sets, options.windows)
            body["rows"].append(
                {"set": name, "samples": len(windows), "asked": asked, "texts": texts}
            )
            print(name, asked, perplexity.line(texts), flush=True)
            path = record.write(options.name, body, out=options.out)
    print(path)


if __name__ == "__main__":
    main()
