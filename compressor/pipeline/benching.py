"""``bench``: how fast a run is beside its base with the stock caches, and what its cache takes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vdcompress import decode_speed
from vdcompress.artifact import Compressed, load_artifact
from vdcompress.cache_kinds import OWN, STOCK, needed_bytes, prompt_bytes, unavailable
from vdcompress.decode_speed import Contender
from vdcompress.errors import ModelError, UsageError
from vdcompress.events import OnEvent, Progress, Stopwatch, Warned, ignore
from vdcompress.load import Base
from vdcompress.peak_memory import free_memory
from vdcompress.pipeline.bench_rows import measured, skipped
from vdcompress.pipeline.document import Timed, document, environment, peak_memory
from vdcompress.pipeline.opening import open_base_of
from vdcompress.speed_rounds import Outcome, rounds

STAGE = "bench"
COMPRESSED = "compressed"
LONGEST_PREFILL = 1024
NOISY = 0.25  # of the median, by which rounds may differ before it is told
RANDOM = (
    "decode is measured behind a cache filled with random numbers, not behind a text that was read"
)
PLAIN = "steps are plain calls of the model: nothing is compiled, the static cache neither"
GRAPHS = "graph: one such step replayed from a CUDA graph, the GPU's work without its launches"
REPLAYS = 4  # times as many steps as are decoded, since they take less time

Json = dict[str, Any]


@dataclass(frozen=True)
class Workload:
    """What is measured.

    Attributes:
        contexts: tokens cached when decoding starts.
        batches: sequences at once.
        prefill: tokens of a prompt, at most the context; None for the context, at most 1024.
        new_tokens: steps timed in each round.
        repeats: rounds.
        dtype: of weights and caches; None for what the run is stored in.
    """

    contexts: tuple[int, ...] = (1024, 4096, 16384)
    batches: tuple[int, ...] = (1,)
    prefill: int | None = None
    new_tokens: int = 16
    repeats: int = 3
    dtype: str | None = None

    def __post_init__(self) -> None:
        """Raise :class:`UsageError` for what cannot be measured."""
        prompt = () if self.prefill is None else (self.prefill,)
        numbers = (*self.contexts, *self.batches, *prompt, self.new_tokens, self.repeats)
        if not self.contexts or not self.batches or min(numbers) < 1:
            raise UsageError("contexts, batches and counts are whole numbers above zero")

    def prompt(self, context: int) -> int:
        """Return how many tokens of a prompt are read for a context."""
        return min(context, LONGEST_PREFILL if self.prefill is None else self.prefill)


@dataclass
class Bench:
    """A benchmark under way: what it measured so far is always at hand.

    Attributes:
        run: the folder.
        compressed: its model.
        base: what it came from.
        work: what is measured.
        device: where.
        timed: hears what happens.
        start_memory: the process's peak when the work began.
        rows: the figures so far, those of one context and batch together.
        notes: what whoever reads them should know.
        complete: whether every row is there.
    """

    run: Path
    compressed: Compressed
    base: Base
    work: Workload
    device: str
    timed: Timed
    start_memory: int | None
    rows: list[Json] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    complete: bool = False
    prompts: dict[tuple[int, int], dict[str, Outcome]] = field(default_factory=dict)

    def document(self) -> Json:
        """Return the document of ``bench``, of what was measured so far."""
        work = self.work
        return document(
            "bench",
            self.base,
            self.compressed.plan,
            run=str(self.run),
            complete=self.complete,
            dtype=work.dtype,
            new_tokens=work.new_tokens,
            repeats=work.repeats,
            rows=self.rows,
            notes=self.notes,
            seconds=self.timed.seconds,
            environment=environment(self.device, self.start_memory),
        )

    @property
    def contenders(self) -> list[Contender]:
        """The base with each stock cache, and the run's model with its own; the latter is last."""
        plan = self.compressed.plan
        full = (plan.shape.full_layout(),) * plan.shape.layers
        stock = [Contender(kind.name, self.base.model, full, kind) for kind in STOCK]
        return [*stock, Contender(COMPRESSED, self.compressed.model, plan.layers, OWN)]


def open_bench(
    run: Path, work: Workload, *, device: str = "cpu", on_event: OnEvent = ignore
) -> Bench:
    """Load a run and its base in one dtype, ready to be measured.

    Args:
        run: a finished run or exported folder.
        work: what to measure.
        device: where.
        on_event: hears what happens, warnings too.
    """
    timed = Timed(on_event)
    start_memory = peak_memory()
    with Stopwatch(timed).stage("load"):
        compressed = load_artifact(run, device=device)
        base = open_base_of(compressed, device)
        work = replace(work, dtype=work.dtype or compressed.dtype)
        dtype = getattr(torch, str(work.dtype))
        for model in (base.model, compressed.model):
            model.to(dtype)
    notes = [RANDOM, PLAIN, *([GRAPHS] if _has_graphs(device) else [])]
    bench = Bench(run, compressed, base, work, device, timed, start_memory, notes=notes)
    longest = getattr(base.config, "max_position_embeddings", None)
    if longest is not None and max(work.contexts) + work.new_tokens >= longest:
        note = (
            f"the model was made for {longest:,} tokens: beyond them only the speed means something"
        )
        bench.notes.append(note)
        timed(Warned(note))
    return bench


def run_bench(bench: Bench) -> Json:
    """Measure every context and batch, and return the document.

    An interruption leaves what was measured in ``bench``.
    """
    work = bench.work
    total = len(work.contexts) * len(work.batches) * work.repeats
    with Stopwatch(bench.timed).stage(STAGE, total):
        for done, (batch, context) in enumerate(
            (batch, context) for batch in work.batches for context in work.contexts
        ):
            bench.rows += _rows(bench, context, batch, done * work.repeats)
    bench.complete = True
    _tell_noise(bench)
    return bench.document()


def _tell_noise(bench: Bench) -> None:
    """Warn of rounds that differ much: then the machine had other work."""
    widest = max((row["spread"] for row in bench.rows if row["state"] == "done"), default=0.0)
    if widest > NOISY:
        note = f"rounds differ by up to {widest:.0%}: leave the machine alone, or add --repeats"
        bench.notes.append(note)
        bench.timed(Warned(note))


def is_measured(found: Json) -> bool:
    """Say whether any row of a document has figures."""
    return any(row["state"] == "done" for row in found["rows"])


def require_measured(found: Json) -> None:
    """Raise :class:`ModelError` if no row of a document has figures."""
    if not is_measured(found):
        reason = found["rows"][-1]["reason"]
        raise ModelError(f"nothing was measured: {reason}", "try a smaller --context or --batch")


def _rows(bench: Bench, context: int, batch: int, done: int) -> list[Json]:
    """Return the rows of one context and batch; they are there whether or not they have figures."""
    work = bench.work
    left_out = {c.name: _left_out(bench, c, context, batch) for c in bench.contenders}
    able = [c for c in bench.contenders if not left_out[c.name]]
    prompt = work.prompt(context)
    prompts = bench.prompts.setdefault((prompt, batch), {})
    new = [contender for contender in able if contender.name not in prompts]
    measure = partial(decode_speed.prefill, tokens=prompt, batch=batch)
    prompts |= rounds(new, measure, work.repeats)
    measure = partial(decode_speed.decode, context=context, batch=batch, new_tokens=work.new_tokens)
    where = f"batch {batch}, {context:,} tokens"
    decoded = rounds(
        able,
        measure,
        work.repeats,
        lambda now: bench.timed(Progress(STAGE, done + now, where)),
    )
    replayed = _replayed(bench, able, context, batch)
    rows = []
    for contender in bench.contenders:
        reason = left_out[contender.name]
        row = {
            "model": "base" if contender.model is bench.base.model else COMPRESSED,
            "cache": contender.name,
            "context": context,
            "batch": batch,
            "prefill_tokens": prompt,
        }
        name = contender.name
        figures = skipped(reason) if reason else measured(decoded, prompts, replayed, name)
        rows.append(row | figures)
    return rows


def _has_graphs(device: str) -> bool:
    return device.startswith("cuda")


def _replayed(bench: Bench, able: list[Contender], context: int, batch: int) -> dict[str, Outcome]:
    """Return what came of steps in CUDA graphs, of the caches that graphs may hold."""
    if not _has_graphs(bench.device):
        return {}
    held = [contender for contender in able if not contender.kind.needs]
    replays = REPLAYS * bench.work.new_tokens
    measure = partial(decode_speed.replay, context=context, batch=batch, replays=replays)
    found = rounds(held, measure, bench.work.repeats, optional=True)
    for name, outcome in found.items():
        if isinstance(outcome, str):
            bench.timed(Warned(f"no CUDA graph of a step with the {name} cache: {outcome}"))
    return found


def _left_out(bench: Bench, contender: Contender, context: int, batch: int) -> str:
    """Return why a contender is not measured here, empty if it is."""
    reason = unavailable(contender.kind, contender.model.config)
    if reason:
        return reason
    plan, dtype = bench.compressed.plan, str(bench.work.dtype)
    needed = needed_bytes(plan, contender.kind, context, batch, dtype)
    needed += prompt_bytes(plan, bench.work.prompt(context), batch, dtype)
    free = free_memory(bench.device)
    if needed <= free:
        return ""
    return f"needs about {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
