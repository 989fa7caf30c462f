"""The epochs of a finetune: a table that grows on a terminal, a line for each in a pipe."""

from __future__ import annotations

from rich import box
from rich.table import Table

from vdcompress.events import EpochEnded, HealingBegan
from vdcompress.report import duration

TAKEN = 9  # lines of a terminal that are not rows: header, rule, start, gaps, bars, prompt
FEWEST = 3


class EpochTable:
    """What healing has reached so far.

    Args:
        start: the event with which it began; its history is taken over.
    """

    def __init__(self, start: HealingBegan) -> None:
        self.start = start.val_ppl
        self.ended: list[EpochEnded] = list(start.history)

    def add(self, event: EpochEnded) -> None:
        """Take an epoch."""
        self.ended.append(event)

    def drawn(self, height: int | None = None) -> Table:
        """Draw it, in a terminal of so many lines only the last epochs that fit."""
        table = Table(box=box.SIMPLE_HEAD)
        for name in ("epoch", "train ppl", "val ppl", "change", "tokens/s", "time"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("")
        kept = len(self.ended) if height is None else max(height - TAKEN, FEWEST)
        best = max((epoch.epoch for epoch in self.ended if epoch.best), default=0)
        first = ("start", "", f"{self.start:.2f}", "", "", "", "" if best else "best")
        table.add_row(*first, style=None if best else "bold green")
        if len(self.ended) > kept:
            table.add_row("...", style="dim")
        for epoch in self.ended[max(0, len(self.ended) - kept) :]:
            is_best = epoch.epoch == best
            cells = (*self._cells(epoch), "best" if is_best else "")
            table.add_row(*cells, style="bold green" if is_best else None)
        return table

    def _cells(self, epoch: EpochEnded) -> tuple[str, ...]:
        change = round(epoch.val_ppl / self.start - 1, 4) + 0.0  # no minus before a zero
        return (
            str(epoch.epoch),
            f"{epoch.train_ppl:.2f}",
            f"{epoch.val_ppl:.2f}",
            f"{change:+.2%}",
            f"{epoch.tokens / epoch.seconds:,.0f}" if epoch.seconds else "",
            duration(epoch.seconds),
        )


def start_line(event: HealingBegan) -> str:
    """Return the line of the start."""
    return f"Epoch 0: val_ppl={event.val_ppl:.2f}"


def epoch_line(event: EpochEnded) -> str:
    """Return an epoch's line, ``*`` marking the best so far."""
    star = " *" if event.best else ""
    return f"Epoch {event.epoch}: train_ppl={event.train_ppl:.2f} val_ppl={event.val_ppl:.2f}{star}"
