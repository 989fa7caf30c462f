"""Draw the core's events on stderr: bars on a terminal, plain lines in a pipe."""

from __future__ import annotations

import math
import sys
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.text import Text

from vdcompress import events
from vdcompress.events import EpochEnded, Event, RowEnded, StageEnded, StageStarted, Warned


class Steps(ProgressColumn):
    """How many steps of how many; nothing where that is not known."""

    def render(self, task: Task) -> Text:
        """Draw it."""
        return Text("" if task.total is None else f"{task.completed:.0f}/{task.total:.0f}")


class Display:
    """Listens to events: ``with Display(console) as display: work(on_event=display)``."""

    def __init__(self, console: Console, *, quiet: bool = False) -> None:
        self.console = console
        self.quiet = quiet
        self._bars: Progress | None = None
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Display:
        """Begin drawing, on a terminal."""
        if self.console.is_terminal and not self.quiet:
            self._bars = Progress(
                SpinnerColumn(),
                TextColumn("{task.description:<10}"),
                BarColumn(bar_width=32),
                Steps(),
                TimeElapsedColumn(),
                TextColumn("[dim]{task.fields[note]}"),
                console=self.console,
                transient=True,
            )
            self._bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Leave the terminal as it was."""
        self.stop()

    def stop(self) -> None:
        """Stop drawing; the lines of finished stages stay."""
        if self._bars:
            self._bars.stop()
            self._bars = None

    def __call__(self, event: Event) -> None:
        """Draw one event."""
        if isinstance(event, Warned):
            self._print(Text.assemble(("warning: ", "bold yellow"), event.message))
        elif self.quiet:
            return
        elif isinstance(event, EpochEnded):
            self._print(Text(epoch_line(event)))
        elif isinstance(event, RowEnded):
            self._print(Text(row_line(event)))
        elif isinstance(event, StageStarted):
            self._start(event)
        elif isinstance(event, StageEnded):
            self._end(event)
        else:
            self._advance(event)

    def _start(self, event: StageStarted) -> None:
        if self._bars and event.stage not in self._tasks:
            task = self._bars.add_task(event.stage, total=event.total, note="")
            self._tasks[event.stage] = task

    def _advance(self, event: events.Progress) -> None:
        if self._bars and event.stage in self._tasks:
            self._bars.update(self._tasks[event.stage], completed=event.done, note=event.note)

    def _end(self, event: StageEnded) -> None:
        task = self._tasks.pop(event.stage, None)
        if self._bars and task is not None:
            self._bars.remove_task(task)
        if sys.exception() is not None:  # it was left, not finished
            return
        mark = ("✓ ", "green") if self.console.is_terminal else ""
        self._print(Text.assemble(mark, f"{event.stage:<10} {event.seconds:6.1f} s"))

    def _print(self, text: Text) -> None:
        self.console.print(text, soft_wrap=True)


def epoch_line(event: EpochEnded) -> str:
    """Return an epoch's line, ``*`` marking the best so far."""
    star = " *" if event.best else ""
    if event.epoch == 0 or math.isnan(event.train_ppl):
        return f"Epoch {event.epoch}: val_ppl={event.val_ppl:.1f}{star}"
    return f"Epoch {event.epoch}: train_ppl={event.train_ppl:.1f} val_ppl={event.val_ppl:.1f}{star}"


def row_line(event: RowEnded) -> str:
    """Return a row of a sweep in one line."""
    if event.bytes_per_token is None or event.perplexity is None or event.ratio is None:
        return f"{event.row}: not measured: {event.reason}"
    change = round(event.ratio - 1, 4) + 0.0  # no minus before a zero
    return (
        f"{event.row}: {event.bytes_per_token:,} bytes per token, ppl {event.perplexity:.2f} "
        f"({change:+.2%}), {event.seconds:.1f} s"
    )
