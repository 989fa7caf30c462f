"""Draw the core's events on stderr: bars on a terminal, plain lines in a pipe."""

from __future__ import annotations

import sys
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
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
from vdcompress.cli.epochs import EpochTable, epoch_line, start_line
from vdcompress.events import (
    EpochEnded,
    Event,
    HealingBegan,
    RowEnded,
    StageEnded,
    StageStarted,
    Warned,
)
from vdcompress.healing.settings import STAGE

BAR, NARROW_BAR = 32, 12
WIDE = 100


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
        self._live: Live | None = None
        self._epochs: EpochTable | None = None
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Display:
        """Begin drawing, on a terminal."""
        if self.console.is_terminal and not self.quiet:
            self._bars = Progress(
                SpinnerColumn(),
                TextColumn("{task.description:<10}"),
                BarColumn(bar_width=BAR if self.console.width >= WIDE else NARROW_BAR),
                Steps(),
                TimeElapsedColumn(),
                TextColumn("[dim]{task.fields[note]}"),
                console=self.console,
            )
            self._live = Live(get_renderable=self._drawn, console=self.console, transient=True)
            self._live.start()
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
        if self._live:
            self._live.stop()
            self._bars = self._live = None

    def __call__(self, event: Event) -> None:
        """Draw one event."""
        if isinstance(event, Warned):
            self._print(Text.assemble(("warning: ", "bold yellow"), event.message))
        elif self.quiet:
            return
        elif isinstance(event, HealingBegan):
            self._begin_epochs(event)
        elif isinstance(event, EpochEnded):
            self._end_epoch(event)
        elif isinstance(event, RowEnded):
            self._print(Text(row_line(event)))
        elif isinstance(event, StageStarted):
            self._start(event)
        elif isinstance(event, StageEnded):
            self._end(event)
        else:
            self._advance(event)

    def _drawn(self) -> Group:
        """Return what moves: the epochs so far and the bars of stages under way."""
        bars = [] if self._bars is None else [self._bars.get_renderable()]
        if self._epochs is None:
            return Group(*bars)
        return Group(self._epochs.drawn(self.console.height), *bars)

    def _begin_epochs(self, event: HealingBegan) -> None:
        if self._bars:
            self._epochs = EpochTable(event)
            return
        for line in (start_line(event), *map(epoch_line, event.history)):
            self._print(Text(line))

    def _end_epoch(self, event: EpochEnded) -> None:
        if self._epochs is None:
            self._print(Text(epoch_line(event)))
        else:
            self._epochs.add(event)

    def _leave_epochs(self) -> None:
        """Leave the table of epochs where it stands."""
        if self._epochs is not None:
            table, self._epochs = self._epochs, None
            self.console.print(table.drawn())

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
        if event.stage == STAGE:
            self._leave_epochs()
        if sys.exception() is not None:  # it was left, not finished
            return
        mark = ("✓ ", "green") if self.console.is_terminal else ""
        self._print(Text.assemble(mark, f"{event.stage:<10} {event.seconds:6.1f} s"))

    def _print(self, text: Text) -> None:
        self.console.print(text, soft_wrap=True)


def row_line(event: RowEnded) -> str:
    """Return a row of a sweep in one line."""
    if event.bytes_per_token is None or event.perplexity is None or event.ratio is None:
        return f"{event.row}: not measured: {event.reason}"
    change = round(event.ratio - 1, 4) + 0.0  # no minus before a zero
    return (
        f"{event.row}: {event.bytes_per_token:,} bytes per token, ppl {event.perplexity:.2f} "
        f"({change:+.2%}), {event.seconds:.1f} s"
    )
