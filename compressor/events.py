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
    """One epoch of healing ended.

    Attributes:
        epoch: its number, from 1.
        train_ppl: perplexity of the training text, while it learned from it.
        val_ppl: validation perplexity at its end.
        best: whether that is the lowest so far.
        tokens: training tokens predicted in it.
        seconds: that its training took, validation apart; two epochs may be equal without it.
    """

    epoch: int
    train_ppl: float
    val_ppl: float
    best: bool
    tokens: int = 0
    seconds: float = field(default=0.0, compare=False)


@dataclass(frozen=True)
class HealingBegan:
    """Healing begins or goes on.

    Attributes:
        val_ppl: validation perplexity of the start.
        epochs: there are at most so many.
        history: those that ended before, if it goes on.
    """

    val_ppl: float
    epochs: int
    history: tuple[EpochEnded, ...] = ()


@dataclass(frozen=True)
class RowEnded:
    """One row of a sweep ended, with its figures, or with the ``reason`` why it has none."""

    row: str
    seconds: float
    bytes_per_token: int | None = None
    perplexity: float | None = None
    ratio: float | None = None
    reason: str = ""


Event = StageStarted | Progress | StageEnded | Warned | HealingBegan | EpochEnded | RowEnded
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
