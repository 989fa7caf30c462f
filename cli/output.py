"""What a command shows: results on stdout, everything else on stderr."""

from __future__ import annotations

import errno
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console
from rich.text import Text

if TYPE_CHECKING:
    from rich.table import Table as Drawing

    from vdcompress.report import Table

PLAIN_WIDTH = 120


Kept = Callable[[], tuple[str, str]]


@dataclass(frozen=True)
class Flags:
    """How much a command says, and in which form."""

    json: bool = False
    quiet: bool = False
    verbose: bool = False
    debug: bool = False


class Terminal(Console):
    """A rich console that leaves a closed pipe to :func:`~vdcompress.cli.session.session`."""

    def on_broken_pipe(self) -> None:
        """Pass the error on."""
        raise BrokenPipeError(errno.EPIPE, "closed")


class Output:
    """One command's stdout and stderr."""

    def __init__(self, flags: Flags) -> None:
        self.flags = flags
        from vdcompress.cli.progress import Display

        self.out = _console(stderr=False)
        self.err = _console(stderr=True)
        self.display = Display(self.err, quiet=flags.quiet)

    def note(self, message: str) -> None:
        """Say something in passing (stderr)."""
        if not self.flags.quiet:
            self.err.print(Text(message, style="dim"), soft_wrap=True)

    def result(self, document: dict[str, Any], *tables: Table | str) -> None:
        """Print a command's result once (stdout): the document, or tables and lines for people."""
        self.display.stop()
        if self.flags.json:
            print(json.dumps(document, indent=2))
            return
        for table in tables:
            if isinstance(table, str):
                self.out.print(table, markup=False, highlight=False, soft_wrap=True)
            else:
                self.out.print(_drawn(table))

    def fail(self, message: str, hint: str = "") -> None:
        """Print an error and what to do about it (stderr), each in one line."""
        self.display.stop()
        error = Text.assemble(("error: ", "bold red"), _one_line(message))
        self.err.print(error, soft_wrap=True)
        if hint:
            self.err.print(Text.assemble(("hint: ", "bold"), _one_line(hint)), soft_wrap=True)

    def keep(self, kept: Kept) -> None:
        """Say what an error left that can be continued (stderr)."""
        message, hint = kept()
        if hint:
            self.note(f"{message}; {hint}")

    def interrupted(self, message: str, hint: str) -> None:
        """Say what an interruption left behind (stderr)."""
        self.display.stop()
        self.err.print(Text.assemble(("interrupted: ", "bold yellow"), message), soft_wrap=True)
        if hint:
            self.err.print(Text.assemble(("hint: ", "bold"), hint), soft_wrap=True)


def _drawn(table: Table) -> Drawing:
    """Draw a table: names on the left, figures on the right."""
    from rich import box
    from rich.table import Table as Drawing

    drawing = Drawing(title=table.title or None, box=box.SIMPLE_HEAD, title_justify="left")
    for number, name in enumerate(table.header):
        justify: Literal["left", "right"] = "right" if number in table.right else "left"
        drawing.add_column(name, justify=justify, overflow="fold")
    for row in table.rows:
        drawing.add_row(*map(Text, row))
    return drawing


def _console(*, stderr: bool) -> Terminal:
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else PLAIN_WIDTH
    return Terminal(file=stream, width=width, highlight=False)


def _one_line(text: str) -> str:
    return " ".join(text.split())
