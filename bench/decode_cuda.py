"""Decode attention of one layer on CUDA, over latents in 16 to 2 bits.

    python bench/decode_cuda.py                     correctness, then times, into bench/results
    python bench/decode_cuda.py --check             correctness only
    python bench/decode_cuda.py --sweep --minutes 6 tries how work is cut, and prints the best

Times are of CUDA graphs that go over as many caches as fill 200 MB, so that none is in the L2 when
it is read. Beside them: cuDNN's attention over the uncompressed bf16 cache, the time that the
cache's bytes take at the bandwidth of a copy, and that in which a kernel only adds them up. Without
CUDA everything runs in Triton's interpreter (``TRITON_INTERPRET=1``), at sizes that ``--tiny``
makes small, and times mean nothing.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import record
import torch
import triton
from decode_cases import DTYPE, Case, cases, drawn_spans, nbytes, reference
from decode_sweep import sweep
from decode_timing import (
    COLD_BYTES,
    CUDA,
    DEVICE,
    SCALING,
    compile_ahead,
    copies,
    drawn_caches,
    drawn_query,
    reading_alone,
    seconds,
    timed,
)
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from vdcompress.modeling.decode_sections import table_settings
from vdcompress.modeling.decode_spans import Span
from vdcompress.modeling.triton_decode import decode

TOLERANCE = 8e-3
CHECKED = (3, 1184)  # sequences and tokens
SHAPES = ((32, 8192), (1, 32768))
BACKENDS = (
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="correctness only")
    parser.add_argument("--sweep", action="store_true", help="try how work is cut")
    parser.add_argument("--minutes", type=float, default=8.0, help="of a sweep")
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--workers", type=int, default=14, help="processes that compile")
    parser.add_argument("--tiny", action="store_true", help="sizes for the interpreter")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    shapes = ((2, 96), (1, 160)) if options.tiny else SHAPES
    chosen = [
        case
        for batch, tokens in shapes
        for case in cases(batch, tokens, targets=(batch, tokens) == SHAPES[0])
        if options.only in case.name
    ]
    if options.sweep:
        body = {"rows": sweep(chosen, options.minutes * 60, options.workers)}
        print(record.write(f"decode-sweep-{DEVICE}", body, out=options.out or Path("runs")))
        return
    if CUDA:
        compile_ahead([(case, None) for case in chosen], options.workers)
    checked = check([case for case in chosen if (case.batch, case.tokens) == shapes[0]])
    wrong = [name for name, error in checked.items() if not error < TOLERANCE]
    if options.check:
        sys.exit(f"wrong: {', '.join(wrong)}" if wrong else 0)
    chosen = [case for case in chosen if case.name not in wrong]
    body: dict[str, Any] = {"dtype": "bfloat16", "cold_bytes": COLD_BYTES, "checked": checked}
    body["copy_bytes_per_second"] = bandwidth = copy_bandwidth(2**22 if options.tiny else 2**32)
    print(f"copy: {bandwidth / 1e12:.2f} TB/s, bytes read and written", flush=True)
    body["bases"] = bases(chosen)
    body["rows"] = [measured(case, bandwidth, body["bases"]) for case in chosen]
    print(record.write(f"decode-{device_name()}", body, out=options.out))
    if wrong:
        sys.exit(f"wrong, and not timed: {', '.join(wrong)}")


def device_name() -> str:
    """Return the device, and of which kind a GPU is: what is fast on one may not be on another."""
    if not CUDA:
        return f"{DEVICE}-interpreter"
    words = torch.cuda.get_device_name().lower().removeprefix("nvidia ").split()
    return f"{DEVICE}-{words[0]}"


def check(chosen: list[Case]) -> dict[str, float]:
    """Return each case's error beside float64, at a small size; NaN where a kernel failed."""
    found = {}
    for case in chosen:
        batch, tokens = CHECKED if CUDA else (case.batch, case.tokens)
        small = replace(case, batch=batch, tokens=tokens)
        draw = torch.Generator(DEVICE).manual_seed(11)
        spans, query = drawn_spans(small, DEVICE, draw), drawn_query(small, draw)
        found[case.name] = error = _error(query, spans)
        print(f"{'ok  ' if error < TOLERANCE else 'WRONG'} {error:.1e} {case.name}", flush=True)
    return found


def _error(query: torch.Tensor, spans: list[Span]) -> float:
    expected = reference(query, spans, SCALING)
    try:
        given = decode(query, spans, None, SCALING).double()
    except triton.TritonError as error:
        print(f"{type(error).__name__}: {str(error)[:300]}", flush=True)
        return math.nan
    return float((given - expected).norm() / expected.norm())


def copy_bandwidth(size: int) -> float:
    """Return the bytes per second, read and written, of the fastest copy of so many bytes.

    A copy in a graph is left to the copy engines; a kernel's can be faster.
    """
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=DEVICE).view(torch.int64)
    goal = torch.empty_like(source)
    copies = (lambda: goal.copy_(source), lambda: torch.bitwise_not(source, out=goal))
    return 2 * size / min(seconds([copy], replays=5) for copy in copies)


def bases(chosen: list[Case]) -> dict[str, dict[str, Any]]:
    """Return the seconds of torch's attention over each shape's uncompressed cache."""
    found = {}
    for case in {case.shape: case for case in chosen}.values():
        kv_heads, width = case.base
        draw = torch.Generator(DEVICE).manual_seed(1)
        shape = (case.batch, kv_heads, case.tokens, width)
        size = 4 * case.batch * kv_heads * case.tokens * width
        caches = [
            [torch.randn(shape, generator=draw, device=DEVICE, dtype=DTYPE) for _ in range(2)]
            for _ in range(copies(size))
        ]
        query = torch.randn(
            case.batch, case.heads, 1, width, generator=draw, device=DEVICE, dtype=DTYPE
        )
        attend = partial(scaled_dot_product_attention, query, enable_gqa=kv_heads != case.heads)
        calls = [partial(attend, *cache) for cache in caches]
        found[case.shape] = base = fastest_base(calls)
        print(f"{1e6 * base['seconds']:8.1f} us {base['backend']}, {case.shape}", flush=True)
    return found


def fastest_base(calls: list[Callable[[], Any]]) -> dict[str, Any]:
    """Return cuDNN's seconds, or the next backend's where cuDNN does not know a shape."""
    for backend in BACKENDS if CUDA else (SDPBackend.MATH,):
        try:
            with sdpa_kernel(backend):
                calls[0]()
                return {"backend": backend.name, "seconds": seconds(calls)}
        except RuntimeError as error:
            print(f"{backend.name}: {str(error).splitlines()[0]}", flush=True)
    raise SystemExit("no backend attends over the uncompressed cache")


def measured(case: Case, bandwidth: float, base: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return one case's time, twice, beside its bound and the uncompressed cache's time."""
    caches, query = drawn_caches(case)
    size = nbytes(caches[0])
    used = table_settings(caches[0], case.heads // case.groups)
    first, again = (timed(caches, query, None) for _ in range(2))
    row = {"name": case.name, "shape": case.shape, "bytes": size, "seconds": min(first, again)}
    row |= {"again": max(first, again), "bound": size / bandwidth, "settings": asdict(used)}
    row |= {"base": base[case.shape]["seconds"], "target_us": case.target_us}
    row["reading"] = reading_alone(size)
    print(
        f"{1e6 * row['seconds']:8.1f} us, bound {1e6 * row['bound']:6.1f}, "
        f"{row['bound'] / row['seconds']:4.0%}, reading alone {1e6 * row['reading']:6.1f}, "
        f"target {case.target_us}, "
        f"base {1e6 * row['base']:6.1f}, {case.name}, {case.shape}",
        flush=True,
    )
    return row


if __name__ == "__main__":
    main()
