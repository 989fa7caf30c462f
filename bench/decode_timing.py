"""Caches that are cold when their turn comes, times of CUDA graphs, kernels compiled ahead."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from typing import Any

import torch
import triton
import triton.language as tl
from decode_cases import DTYPE, Case, drawn_spans, nbytes

from vdcompress.modeling.decode_settings import Settings
from vdcompress.modeling.triton_decode import decode, multiprocessors

COLD_BYTES = 200 * 2**20
SCALING = 0.125
REPLAYS, ROUNDS = 20, 7
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


def drawn_query(case: Case, draw: torch.Generator) -> torch.Tensor:
    shape = (case.batch, case.heads, 1, case.query_width)
    return torch.randn(*shape, generator=draw, device=DEVICE, dtype=DTYPE)


def drawn_caches(case: Case) -> tuple[list[Any], torch.Tensor]:
    """Return as many caches as are cold when their turn comes, and a query."""
    draw = torch.Generator(DEVICE).manual_seed(5)
    first = drawn_spans(case, DEVICE, draw)
    rest = [drawn_spans(case, DEVICE, draw) for _ in range(copies(nbytes(first)) - 1)]
    return [first, *rest], drawn_query(case, draw)


def copies(size: int) -> int:
    """Return how many caches of a size hold so much that the L2 keeps none of them."""
    return max(2, -(-COLD_BYTES // size)) if CUDA else 2


def timed(caches: list[Any], query: torch.Tensor, settings: Settings | None) -> float:
    return seconds([lambda c=c: decode(query, c, None, SCALING, settings=settings) for c in caches])


def seconds(calls: list[Callable[[], Any]], replays: int = REPLAYS) -> float:
    """Return the median seconds of a call, of graphs of all calls in a row."""
    if not CUDA:
        start = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - start) / len(calls)
    graph = captured(calls)
    found = []
    for _ in range(ROUNDS):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(replays):
            graph.replay()
        stop.record()
        stop.synchronize()
        found.append(start.elapsed_time(stop) / 1e3 / replays / len(calls))
    return statistics.median(found)


READ, AT_ONCE, READERS = 512, 8, 4  # numbers of a load, loads of a turn, programs of a processor


@triton.jit
def _add_up(numbers, sums, count, READ: tl.constexpr, AT_ONCE: tl.constexpr):
    """Leave the sum of each program's share of numbers."""
    share = tl.cdiv(count, tl.num_programs(0))
    start = tl.program_id(0) * share
    found = tl.zeros([READ], tl.float32)
    for first in tl.range(0, share, READ * AT_ONCE):
        for k in tl.static_range(AT_ONCE):
            at = first + k * READ + tl.arange(0, READ)
            inside = (at < share) & (start + at < count)
            found += tl.load(numbers + start + at, mask=inside, other=0).to(tl.float32)
    tl.store(sums + tl.program_id(0), tl.sum(found))


def reading_alone(size: int) -> float:
    """Return the seconds in which a kernel that adds up so many bytes has read them."""
    programs = READERS * multiprocessors(torch.device(DEVICE))
    sums = torch.empty(programs, device=DEVICE)
    caches = [torch.ones(size // 4, dtype=torch.int32, device=DEVICE) for _ in range(copies(size))]
    add_up = _add_up[(programs,)]
    found = seconds([partial(add_up, own, sums, size // 4, READ, AT_ONCE) for own in caches])
    if int(sums.double().sum()) != size // 4:
        raise SystemExit("what was read alone is not what is there")
    return found


def captured(calls: list[Callable[[], Any]]) -> torch.cuda.CUDAGraph:
    """Return a graph of calls, warmed up."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    return graph


def compile_ahead(work: list[tuple[Case, Settings | None]], workers: int) -> None:
    """Compile kernels in processes of their own; Triton keeps them on disk."""
    start = time.perf_counter()
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        failed = [words for words in pool.map(compiled, work) if words]
    print(f"compiled {len(work)} in {time.perf_counter() - start:.0f} s, {len(failed)} failed")
    print(*failed[:3], sep="\n", flush=True)


def compiled(work: tuple[Case, Settings | None]) -> str | None:
    """Run a case once, at a small size; return what went wrong."""
    case, settings = work
    draw = torch.Generator(DEVICE).manual_seed(0)
    small = replace(case, batch=2, tokens=256 + case.window + case.sinks)
    try:
        spans = drawn_spans(small, DEVICE, draw)
        decode(drawn_query(small, draw), spans, None, SCALING, settings=settings)
        if CUDA:
            torch.cuda.synchronize()
    except Exception as error:  # out of shared memory or registers: not a candidate
        return f"{case.name} {settings}: {type(error).__name__}: {str(error)[:100]}"
    return None
