"""What a command shows: results on stdout, everything else on stderr, errors in two lines."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import typer
from rich.console import Console
from rich.text import Text

from vdcompress.errors import VDCompressError

if TYPE_CHECKING:
    from rich.table import Table as Drawing

    from vdcompress.report import Table

INTERRUPTED = 130
TERMINATED = 143
BROKEN_PIPE = 141
PLAIN_WIDTH = 120


Kept = Callable[[], tuple[str, str]]


@dataclass(frozen=True)
class Flags:
    """How much a command says, and in which form."""

    json: bool = False
    quiet: bool = False
    verbose: bool = False
    debug: bool = False


class Terminated(KeyboardInterrupt):
    """SIGTERM, handled like Ctrl-C."""


class Terminal(Console):
    """A rich console that leaves a closed pipe to :func:`session`."""

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


def nothing_kept() -> tuple[str, str]:
    """Say what an interrupted command leaves unless it knows better."""
    return "nothing was written", ""


@contextmanager
def session(flags: Flags, kept: Kept = nothing_kept) -> Iterator[Output]:
    """Run a command's body: show its progress, turn every error into a line and an exit code.

    Args:
        flags: how much to say.
        kept: says, when interrupted, what is kept and how to go on.

    Raises:
        typer.Exit: with the exit code, whenever the body failed.
    """
    _quieten(flags)
    output = Output(flags)
    try:
        with _terminate_like_interrupt(), output.display:
            yield output
            sys.stdout.flush()
    except (typer.Exit, typer.BadParameter):
        raise
    except BaseException as error:  # the one place where everything must end in a line
        if flags.debug:
            traceback.print_exception(error)
        raise typer.Exit(_explain(error, output, kept)) from None


def _explain(error: BaseException, output: Output, kept: Kept) -> int:
    """Print what happened and return the exit code."""
    if isinstance(error, KeyboardInterrupt):
        output.interrupted(*kept())
        return TERMINATED if isinstance(error, Terminated) else INTERRUPTED
    if isinstance(error, VDCompressError):
        output.fail(error.message, error.hint)
        output.keep(kept)
        return error.exit_code
    if isinstance(error, BrokenPipeError):
        _close_stdout()
        return BROKEN_PIPE
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    message, hint, code = _known(error)
    output.fail(message, hint)
    output.keep(kept)
    return code


def _known(error: BaseException) -> tuple[str, str, int]:
    """Return message, hint and exit code of an error that is not ours."""
    if _number(error) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "no space left on the device", "free some, or choose another folder: -o", 3
    if isinstance(error, PermissionError):
        return f"no permission: {error.filename or error}", "choose another folder: -o", 3
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return "out of memory", "try a shorter --seq-len, or another --device", 3
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}", "a fault of ours: run again with --debug", 1


def _number(error: BaseException) -> int | None:
    """Return the operating system's number of an error, also of one that came through Rust."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None


def _console(*, stderr: bool) -> Terminal:
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else PLAIN_WIDTH
    return Terminal(file=stream, width=width, highlight=False)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _close_stdout() -> None:
    """Point stdout nowhere, so that Python's last flush has nothing to complain about."""
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())


def _quieten(flags: Flags) -> None:
    """Silence what other libraries print, unless the user asked for it."""
    if flags.verbose or flags.debug:
        return
    for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
        os.environ.setdefault(name, "1")
    for name in ("TRANSFORMERS_VERBOSITY", "DATASETS_VERBOSITY", "HF_HUB_VERBOSITY"):
        os.environ.setdefault(name, "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.simplefilter("ignore")
    for name in ("transformers", "datasets", "huggingface_hub", "torch", "accelerate", "httpx"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if transformers := sys.modules.get("transformers"):
        transformers.utils.logging.disable_progress_bar()


@contextmanager
def _terminate_like_interrupt() -> Iterator[None]:
    """Let SIGTERM raise where Ctrl-C would."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_number: int, _frame: object) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
