"""What the core says while it works; whoever calls it decides what to show.

The core never prints. Every long function takes ``on_event``, a callable that gets one of the
values below; the command line draws them, a library user may pass nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass(frozen=True)
class StageStarted:
    """A stage (``load``, ``calibrate``, ...) begins; ``total`` steps, None if not known."""

    stage: str
    total: int | None = None


@dataclass(frozen=True)
class Progress:
    """``done`` of the stage's steps are finished; ``note`` is a short state, such as a loss."""

    stage: str
    done: int
    note: str = ""


@dataclass(frozen=True)
class StageEnded:
    """A stage ended after ``seconds``."""

    stage: str
    seconds: float


@dataclass(frozen=True)
class Warned:
    """Something that the user should know and that stops nothing."""

    message: str


@dataclass(frozen=True)
class EpochEnded:
    """One epoch of healing ended; ``best`` if its validation perplexity is the lowest so far."""

    epoch: int
    train_ppl: float
    val_ppl: float
    best: bool


@dataclass(frozen=True)
class RowEnded:
    """One row of a sweep ended, with its figures, or with the ``reason`` why it has none."""

    row: str
    seconds: float
    bytes_per_token: int | None = None
    perplexity: float | None = None
    ratio: float | None = None
    reason: str = ""


Event = StageStarted | Progress | StageEnded | Warned | EpochEnded | RowEnded
OnEvent = Callable[[Event], None]


def ignore(event: Event) -> None:
    """Drop every event: the default listener."""


@dataclass
class Stopwatch:
    """Times stages and announces them; ``seconds`` maps each stage to its duration."""

    on_event: OnEvent = ignore
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[None]:
        """Announce a stage, run the body, and note its seconds also when it fails."""
        self.on_event(StageStarted(name, total))
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
            self.on_event(StageEnded(name, self.seconds[name]))
