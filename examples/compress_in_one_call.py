"""Compress the checkpoint inside the package in one call, and let it write a few words.

python examples/compress_in_one_call.py [--quick]
"""

from __future__ import annotations

import argparse

import vdcompress
from vdcompress.cache_size import measure_cache


def main(quick: bool) -> None:
    compressed = vdcompress.compress(
        "demo",  # a folder or a hub id works as well
        v_dim=160,  # of 256: each of the 4 heads keeps 40 of its 64 numbers
        overrides={
            "calibration.data": "stdlib",  # or a file, a folder, a dataset on the hub
            "calibration.samples": 4 if quick else 32,
            "calibration.seq_len": 512,
        },
    )
    model, tokenizer, plan = compressed.model, compressed.tokenizer, compressed.plan
    prompt = tokenizer("The key", return_tensors="pt")
    written = model.generate(**prompt, max_new_tokens=24, do_sample=False, pad_token_id=0)
    print(f"cache: {plan.base_bytes_per_token:,} bytes per token before, ", end="")
    print(f"{plan.bytes_per_token:,} after ({-plan.reduction:.1%}), ", end="")
    print(f"{measure_cache(model, tokenizer).bytes_per_token:,.0f} measured after generate()")
    print(f"it writes: {tokenizer.decode(written[0])!r}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="less text, to see that it runs")
    main(parser.parse_args().quick)
