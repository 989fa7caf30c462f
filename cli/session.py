"""How a command ends: every error becomes a line, a hint and an exit code."""

from __future__ import annotations

import errno
import logging
import os
import re
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import typer

from vdcompress.cli.output import Flags, Kept, Output
from vdcompress.errors import VDCompressError
from vdcompress.healing import processes

INTERRUPTED = 130
TERMINATED = 143
BROKEN_PIPE = 141


class Terminated(KeyboardInterrupt):
    """SIGTERM, handled like Ctrl-C."""


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
    if not processes.is_main():
        flags = replace(flags, quiet=True)
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
    if not processes.is_main():
        return _explain_beside(error)
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


def _explain_beside(error: BaseException) -> int:
    """Return the exit code of a process beside the main one, which tells what all meet."""
    if isinstance(error, KeyboardInterrupt):
        return TERMINATED if isinstance(error, Terminated) else INTERRUPTED
    if isinstance(error, VDCompressError):
        return error.exit_code
    message, _, code = _known(error)
    print(f"error in process {processes.rank()}: {message}", file=sys.stderr)
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
