"""Several processes: together they end where one process ends, killed or not."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import Tensor
from torch.distributed import TCPStore

import conftest
import test_heal
from test_heal import SHORT, equal, weights
from vdcompress.errors import UsageError
from vdcompress.events import EpochEnded, Event, Progress
from vdcompress.heal import Healed, HealSettings, heal
from vdcompress.healing import processes, sharding
from vdcompress.healing.trainer import HealTrainer

COUNT = 2
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
}
ACCUMULATED = replace(SHORT, epochs=2, micro_batch=1)


@dataclass(frozen=True)
class Task:
    """One call of :func:`heal` in each process.

    Attributes:
        windows: for training and validation.
        checkpoints: folder.
        settings: of the finetune.
        sharded: by FSDP2, else data parallel.
        dropout: of student and teacher.
        kill: a process's number and the forward pass in which it dies.
        resume: a run that was killed.
    """

    windows: tuple[Tensor, Tensor]
    checkpoints: Path
    settings: HealSettings
    sharded: bool = False
    dropout: float = 0.0
    kill: tuple[int, int] | None = None
    resume: bool = False


@dataclass(frozen=True)
class Ended:
    """What one process has at the end."""

    weights: dict[str, Tensor]
    healed: Healed
    events: list[Event]
    shards: int


def wide_pair(dropout: float) -> tuple[Any, Any]:
    """Return student and teacher in float64, which share what does not differ."""
    student, teacher = test_heal.pair(dropout)
    shared = [n for n, p in student.named_parameters() if p.equal(teacher.get_parameter(n))]
    student.double(), teacher.double()
    for name in shared:
        student.get_parameter(name).data = teacher.get_parameter(name).data
    return student, teacher


def heal_here(task: Task) -> Ended:
    student, teacher = wide_pair(task.dropout)
    events: list[Event] = []
    healed = heal(
        student,
        teacher,
        *task.windows,
        task.settings,
        checkpoints=task.checkpoints,
        resume=task.resume,
        on_event=events.append,
    )
    return Ended(weights(student), replace(healed, seconds=0.0), events, SHARDS[0])


SHARDS = [0]


def in_process(rank: int, port: int, task: Task, results: Path) -> None:
    """Do what a launcher's process does, in one that has imported everything already."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": COUNT, "LOCAL_WORLD_SIZE": COUNT}
    os.environ.update({name: str(value) for name, value in place.items()})
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # it listens before the processes start
    os.environ.update(FSDP if task.sharded else {})
    torch.set_num_threads(1)
    count_shards()
    if task.kill is not None and task.kill[0] == rank:
        die_in_forward_pass(task.kill[1])
    torch.save(heal_here(task), results / f"{rank}.pt")
    processes.end()


def count_shards() -> None:
    free = sharding.reshard

    def counted(model: torch.nn.Module) -> None:
        from torch.distributed.fsdp import FSDPModule

        SHARDS[0] = sum(isinstance(module, FSDPModule) for module in model.modules())
        free(model)

    sharding.reshard = counted


def die_in_forward_pass(number: int) -> None:
    compute, passes = HealTrainer.compute_loss, iter(range(1, number + 1))

    def compute_or_die(*args: Any, **kwargs: Any) -> Tensor:
        if next(passes) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return compute(*args, **kwargs)

    HealTrainer.compute_loss = compute_or_die  # type: ignore[method-assign]


Server = Any


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """Return what starts processes by forking one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_distributed"])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    yield context
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before


def together(server: Server, task: Task, results: Path) -> list[Ended] | None:
    """Run a task in all processes; None if one died, which ends the others, as launchers do."""
    results.mkdir(exist_ok=True)
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    started = [
        server.Process(target=in_process, args=(rank, store.port, task, results), daemon=True)
        for rank in range(COUNT)
    ]
    for process in started:
        process.start()
    running = list(started)
    while running:
        wait([process.sentinel for process in running])
        running = [process for process in running if process.exitcode is None]
        if any(process.exitcode for process in started):
            for process in running:
                process.kill()
    if any(process.exitcode for process in started):
        return None
    return [torch.load(results / f"{rank}.pt", weights_only=False) for rank in range(COUNT)]


text = test_heal.text


@pytest.fixture(scope="module")
def windows(text: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return training windows, and validation windows of which one process has more."""
    return text[0], text[1][:-1]


@pytest.fixture(scope="module")
def alone(windows: tuple[Tensor, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Ended:
    return heal_here(Task(windows, tmp_path_factory.mktemp("alone"), replace(SHORT, epochs=2)))


@pytest.fixture(scope="module")
def sharded(
    server: Server, windows: tuple[Tensor, Tensor], tmp_path_factory: pytest.TempPathFactory
) -> list[Ended]:
    folder = tmp_path_factory.mktemp("sharded")
    ended = together(server, Task(windows, folder / "run", ACCUMULATED, sharded=True), folder)
    assert ended is not None
    return ended


def assert_same(ended: list[Ended], alone: Ended) -> None:
    """See that all processes have what one process has, up to rounding, and that one tells."""
    assert all(equal(one.weights, ended[0].weights) for one in ended)
    for name, value in alone.weights.items():
        torch.testing.assert_close(ended[0].weights[name], value, rtol=0, atol=1e-8)
    for one, other in zip(ended[0].healed.history, alone.healed.history, strict=True):
        assert one.val_ppl == pytest.approx(other.val_ppl, rel=1e-8)
        assert one.train_ppl == pytest.approx(other.train_ppl, rel=1e-8)
    assert ended[0].healed.tokens_seen == alone.healed.tokens_seen
    assert [type(event) for event in ended[0].events] == [type(event) for event in alone.events]
    assert {Progress, EpochEnded} <= {type(event) for event in ended[0].events}
    assert ended[1].events == []


def test_data_parallel_is_one_process(
    server: Server, windows: tuple[Tensor, Tensor], alone: Ended, tmp_path: Path
) -> None:
    ended = together(server, Task(windows, tmp_path / "run", ACCUMULATED), tmp_path)

    assert ended is not None
    assert_same(ended, alone)
    assert ended[0].shards == 0


def test_a_step_in_parts_is_a_whole_one(windows: tuple[Tensor, Tensor], tmp_path: Path) -> None:
    settings = replace(SHORT, epochs=2)
    assert settings.settled().hidden_weight

    whole = heal_here(Task(windows, tmp_path / "whole", settings))
    parts = heal_here(Task(windows, tmp_path / "parts", replace(settings, micro_batch=1)))

    for name, value in whole.weights.items():
        torch.testing.assert_close(parts.weights[name], value, rtol=0, atol=1e-8)


def test_sharded_is_one_process(sharded: list[Ended], alone: Ended) -> None:
    assert_same(sharded, alone)
    assert sharded[0].shards == 1 + 2 * 2  # all of it, and two layers of student and teacher


def killed_and_resumed(
    server: Server, task: Task, folder: Path, kill: tuple[int, int]
) -> list[Ended]:
    task = replace(task, checkpoints=folder / "killed")
    assert together(server, replace(task, kill=kill), folder) is None
    resumed = together(server, replace(task, resume=True), folder)
    assert resumed is not None
    return resumed


def test_sharded_killed_and_resumed_is_never_killed(
    server: Server, windows: tuple[Tensor, Tensor], sharded: list[Ended], tmp_path: Path
) -> None:
    kill = (random.randrange(COUNT), random.randrange(1, 2 * 8 * COUNT))
    task = Task(windows, tmp_path, ACCUMULATED, sharded=True)

    resumed = killed_and_resumed(server, task, tmp_path, kill)

    assert [one.healed for one in resumed] == [one.healed for one in sharded], kill
    assert all(equal(one.weights, sharded[0].weights) for one in resumed), kill


@pytest.mark.slow
@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("rank", range(COUNT))
def test_that_holds_for_every_way_and_with_dropout(
    server: Server, windows: tuple[Tensor, Tensor], tmp_path: Path, shards: bool, rank: int
) -> None:
    settings = replace(ACCUMULATED, train="all", save_steps=2)
    task = Task(windows, tmp_path / "straight", settings, sharded=shards, dropout=0.2)
    straight = together(server, task, tmp_path)
    assert straight is not None
    kill = (rank, random.randrange(1, 2 * 8 * COUNT))

    resumed = killed_and_resumed(server, task, tmp_path, kill)

    assert [one.healed for one in resumed] == [one.healed for one in straight], kill
    assert all(equal(one.weights, straight[0].weights) for one in resumed), kill


# The program


MANY_STEPS = (
    *("--samples", "24", "--seq-len", "32", "--epochs", "2", "--patience", "2"),
    *("--batch-size", "4", "--micro-batch", "2", "--save-steps", "1", "--learning-rate", "1e-3"),
)
STEPS = 12


@dataclass(frozen=True)
class Launcher:
    """How the program is started.

    Attributes:
        through: the module that starts several processes, with its options.
        environment: of all of them.
    """

    through: tuple[str, ...]
    environment: dict[str, str] = field(default_factory=dict)

    def start(self, *arguments: str | Path) -> subprocess.Popen[str]:
        program = ("-m", *self.through, "-m", "vdcompress.cli", "finetune")
        return subprocess.Popen(
            [sys.executable, *program, *map(str, arguments)],
            env=os.environ | self.environment | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str | Path) -> conftest.Ended:
        process = self.start(*arguments)
        out, err = process.communicate()
        return conftest.Ended(process.returncode, out, err)


TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node", str(COUNT))
ACCELERATE = (
    *("accelerate.commands.launch", "--num_processes", str(COUNT)),
    *("--main_process_port", "0"),  # one that is free
)
ON_CPU = {"ACCELERATE_USE_CPU": "true"}  # accelerate's own --cpu starts one process
BY_ACCELERATE = Launcher((*ACCELERATE, "--use_fsdp", "--fsdp_version", "2"), ON_CPU)
BY_TORCHRUN = Launcher(TORCHRUN, FSDP)


@pytest.mark.slow
def test_the_program_under_accelerate_writes_and_prints_once(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torchrun's processes are tested below."""
    monkeypatch.chdir(tmp_path)
    launcher = BY_ACCELERATE
    heal_it = ("--samples", "16", "--seq-len", "32", "--epochs", "1", "--batch-size", "8")

    ended = launcher.run(tiny_run, *heal_it, "--json")

    assert ended.code == 0, ended.err
    assert ended.err.count("Epoch 1: train_ppl=") == 1
    assert [str(path) for path in Path("runs").iterdir()] == [ended.json["run"]]
    assert Path(ended.json["run"], "results.json").is_file()

    wrong = launcher.run(tiny_run, *heal_it, "--batch-size", "7")

    assert wrong.code != 0
    assert wrong.err.count("error: a step of 7 windows cannot be divided") == 1
    assert len(list(Path("runs").iterdir())) == 1


@pytest.mark.slow
def test_the_program_killed_at_any_step_and_resumed_is_never_killed(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    launcher = BY_TORCHRUN
    straight = launcher.run(tiny_run, *MANY_STEPS, "-o", "straight", "--json")
    assert straight.code == 0, straight.err
    assert straight.err.count("Epoch 1: train_ppl=") == 1
    last = random.randrange(2, STEPS)  # nothing is kept before the first one is whole
    process = launcher.start(tiny_run, *MANY_STEPS, "-o", "killed")

    kill_one(process, Path(f"killed.partial/checkpoint-{last}"))

    assert not Path("killed").exists(), last

    resumed = launcher.run("--resume", "killed.partial", "--json")

    assert resumed.code == 0, resumed.err
    weights = Path("straight/model.safetensors").read_bytes()
    assert Path("killed/model.safetensors").read_bytes() == weights, last
    healing = [untimed(ended.json["healing"]) for ended in (straight, resumed)]
    assert healing[0] == healing[1], last
    assert not Path("killed.partial").exists()


def kill_one(process: subprocess.Popen[str], checkpoint: Path) -> None:
    """Kill one of a launcher's processes while a checkpoint is written, or just after it."""
    while process.poll() is None and not checkpoint.exists():
        time.sleep(0.001)
    running = psutil.Process(process.pid).children() if process.poll() is None else []
    if running:
        random.choice(running).kill()
    _, err = process.communicate()
    assert running, err
    assert process.returncode != 0


def untimed(healing: dict[str, Any]) -> dict[str, Any]:
    epochs = [{k: v for k, v in epoch.items() if k != "seconds"} for epoch in healing["epochs"]]
    return healing | {"epochs": epochs, "seconds": None}


def test_a_step_must_divide_among_processes(
    windows: tuple[Tensor, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UsageError, match="a step of 4 windows cannot be divided among 3 proc"):
        heal_here(Task(windows, tmp_path, SHORT))
    assert list(tmp_path.iterdir()) == []
