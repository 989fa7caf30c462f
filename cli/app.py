"""The program ``vdcompress``: its commands, and how it ends."""

from __future__ import annotations

import importlib
import sys
from typing import Annotated

import typer

COMMANDS = (
    "apply",
    "finetune",
    "evaluate",
    "bench",
    "compare",
    "export",
    "inspect",
    "sweep",
    "train",
    "recipes",
    "demo",
)
USAGE = 2

app = typer.Typer(
    name="vdcompress",
    help="Make the key/value cache of a pretrained language model smaller, in the architecture.",
    epilog="Start with: vdcompress demo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib import metadata

        typer.echo(f"vdcompress {metadata.version('vdcompress')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Say which it is."),
    ] = False,
) -> None:
    """Take what comes before a command."""


for _name in COMMANDS:
    importlib.import_module(f"vdcompress.cli.{_name}").register(app)


def run(arguments: list[str] | None = None) -> int:
    """Run the program and return its exit code; errors are two lines on stderr."""
    empty = _empty(sys.argv[1:] if arguments is None else arguments)
    if empty:
        print(f"error: {empty} is empty", file=sys.stderr)
        print("hint: was it a shell's variable that is not set?", file=sys.stderr)
        return USAGE
    try:
        result = app(arguments, prog_name="vdcompress", standalone_mode=False)
    except Exception as error:
        show = getattr(error, "format_message", None)
        if show is None:
            raise
        message = show().replace("Value error, ", "")  # pydantic's word, not a user's
        print(f"error: {message or 'a command is missing'}", file=sys.stderr)
        print(f"hint: {_usage(error)}", file=sys.stderr)
        return USAGE
    return result if isinstance(result, int) else 0


def main() -> None:
    """Run the program and leave with its exit code."""
    try:
        code = run()
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)


def _empty(arguments: list[str]) -> str:
    """Return which argument is an empty string, if one is: none of ours may be."""
    for before, argument in zip(["", *arguments], arguments, strict=False):
        if argument == "":
            return f"what follows {before}" if before.startswith("-") else "an argument"
        if argument.startswith("--") and argument.endswith("="):
            return argument.removesuffix("=")
    return ""


def _usage(error: Exception) -> str:
    context = getattr(error, "ctx", None)
    return f"see: {context.command_path if context else 'vdcompress'} --help"
