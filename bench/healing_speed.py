"""How fast healing is: tokens per second of ``heal``, beside plain passes of student and teacher.

    VDCOMPRESS_STANDINS=... python bench/healing_speed.py --device cuda

The bound is the forward pass of the teacher and the forward and backward pass of the student with
all logits and their KL divergence, in bfloat16 on CUDA, without optimiser, data or validation.
The fused kernel is checked first, against float64.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import record
import standins
import token_sets
import torch
from torch import Tensor
from torch.nn import functional

from vdcompress.calibrate import calibrate
from vdcompress.events import Event, Progress
from vdcompress.heal import HealSettings, heal
from vdcompress.healing import divergence
from vdcompress.load import Base, load
from vdcompress.plan import make_plan
from vdcompress.rewrite import rewrite

MODEL = "pythia-70m-standin"
SHAPES = ((16, 512), (16, 1024), (32, 1024), (32, 128))
WARM_UP = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--shapes", default=",".join(f"{b}x{n}" for b, n in SHAPES))
    parser.add_argument("--profile", type=Path, help="write a table of what took the time")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    base = load(standins.model(MODEL), device=options.device)
    sets = token_sets.read()
    windows = sets[token_sets.CALIBRATION]
    plan = make_plan(base.shape, v_dim=320, k_dim=320)
    statistics = calibrate(base, windows[:8])
    body: dict[str, Any] = {"model": MODEL, "v_dim": 320, "k_dim": 320, "rows": []}
    if options.device == "cuda":
        body["fused_kernel"] = check_kernel()
        print(body["fused_kernel"])
    for shape in options.shapes.split(","):
        batch, length = map(int, shape.split("x"))
        ids = windows.flatten()[: windows.numel() // length * length].view(-1, length)
        for train in ("attention", "all"):
            settings = HealSettings(batch_size=batch, train=train, hidden_weight=0.0, epochs=30)
            bound = plain_speed(base, rewrite(base, plan, statistics), ids, settings, options.steps)
            ours = heal_speed(base, rewrite(base, plan, statistics), ids, settings, options.steps)
            row = {"batch": batch, "length": length, "train": train}
            row |= {"plain": bound, "heal": ours, "ratio": ours["speed"] / bound["speed"]}
            body["rows"].append(row)
            print(row, flush=True)
    if options.profile:
        profile(base, rewrite(base, plan, statistics), ids, options.profile)
    print(record.write(f"healing-speed-{options.device}", body, out=options.out))


def check_kernel() -> dict[str, float]:
    """Return the relative errors of the fused kernel's losses and gradients, against float64."""
    draw = torch.Generator("cuda").manual_seed(7)
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        shape = (37, 50_304)
        student = 3 * torch.randn(shape, generator=draw, device="cuda", dtype=dtype)
        teacher = student + torch.randn(shape, generator=draw, device="cuda", dtype=dtype)
        labels = torch.randint(shape[1], shape[:1], generator=draw, device="cuda")
        goal = divergence.Objective(0.7, 0.4)
        wide = student.double()
        wanted = divergence._losses(wide, teacher.double(), labels, goal, gradient=True)
        sums = divergence._losses(student, teacher, labels, goal, gradient=True)
        name = str(dtype).removeprefix("torch.")
        found[f"{name} losses"] = ((sums - wanted).norm() / wanted.norm()).item()
        found[f"{name} gradients"] = ((student - wide).norm() / wide.norm()).item()
    return found


def plain_speed(
    base: Base, student: Any, ids: Tensor, settings: HealSettings, steps: int
) -> dict[str, float]:
    """Measure the plain passes."""
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(settings.train == "all" or ".attention." in name)
    on_cuda = base.model.device.type == "cuda"

    def step(batch: Tensor) -> None:
        with torch.autocast(batch.device.type, torch.bfloat16, enabled=on_cuda):
            with torch.no_grad():
                target = base.model(batch, use_cache=False).logits.float().log_softmax(-1)
            found = student(batch, use_cache=False).logits.float().log_softmax(-1)
            loss = functional.kl_div(found, target, log_target=True, reduction="sum")
        (loss / batch.numel()).backward()
        student.zero_grad(set_to_none=True)

    batches = [part.to(base.model.device) for part in ids.split(settings.batch_size)]
    return timed(
        lambda number: step(batches[number % (len(batches) - 1)][:, :-1]), ids, settings, steps
    )


def timed(
    step: Callable[[int], None], ids: Tensor, settings: HealSettings, steps: int
) -> dict[str, float]:
    """Return tokens per second and the most memory, in GiB."""
    cuda = torch.cuda.is_available()
    for number in range(WARM_UP):
        step(number)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    started = time.perf_counter()
    for number in range(steps):
        step(number)
    if cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    tokens = steps * settings.batch_size * (ids.shape[1] - 1)
    return {"speed": tokens / seconds, "gib": _peak()}


def heal_speed(
    base: Base, student: Any, ids: Tensor, settings: HealSettings, steps: int
) -> dict[str, float]:
    """Measure ``heal`` between two of its reports, as a user's run goes."""
    marks: list[tuple[int, float]] = []

    def listen(event: Event) -> None:
        if isinstance(event, Progress):
            marks.append((event.done, time.perf_counter()))

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    count = settings.batch_size * (steps + WARM_UP)
    train = ids[torch.arange(count) % len(ids)]
    with tempfile.TemporaryDirectory() as folder:
        heal(
            student, base.model, train, ids[:4], replace(settings, epochs=1),
            checkpoints=Path(folder), on_event=listen,
        )  # fmt: skip
    (first, begin), (last, end) = marks[0], marks[-1]
    tokens = (last - first) * settings.batch_size * (ids.shape[1] - 1)
    return {"speed": tokens / (end - begin), "gib": _peak()}


def profile(base: Base, student: Any, ids: Tensor, path: Path) -> None:
    """Write what the steps of a finetune spend their time on."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    settings = HealSettings(batch_size=16, hidden_weight=0.0, epochs=1)
    with (
        tempfile.TemporaryDirectory() as folder,
        torch.profiler.profile(activities=activities) as found,
    ):
        heal(student, base.model, ids[: 16 * 12], ids[:4], settings, checkpoints=Path(folder))
    table = found.key_averages().table(sort_by="self_cuda_time_total", row_limit=40)
    by_cpu = found.key_averages().table(sort_by="self_cpu_time_total", row_limit=30)
    path.write_text(f"{table}\n{by_cpu}\n")


def _peak() -> float:
    return torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0


if __name__ == "__main__":
    main()
