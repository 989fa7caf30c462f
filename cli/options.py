"""Options that several commands share, so that one word means one thing everywhere."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from vdcompress.healing.settings import MOST_EPOCHS, MOST_SEED

KEPT = "What the cache keeps"
WHAT = "What"
DATA = "Data"
HEALING = "Healing"
WHERE = "Where"
OUTPUT = "Output"


class Refit(StrEnum):
    """The choices of ``--refit``."""

    none = "none"
    local = "local"


class Allocation(StrEnum):
    """The choices of ``--allocation``."""

    uniform = "uniform"
    layers = "layers"


class Target(StrEnum):
    """The choices of ``--for``."""

    transformers = "transformers"
    vllm = "vllm"


class Train(StrEnum):
    """The choices of ``--train``."""

    latents = "latents"
    attention = "attention"
    body = "body"
    all = "all"


class Dtype(StrEnum):
    """The choices of ``--dtype``."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


Run = Annotated[
    Path | None,
    typer.Argument(metavar="[RUN]", help="A run folder; left out, the latest under ./runs."),
]
RecipeName = Annotated[
    str | None,
    typer.Option("--recipe", help="A recipe's name or YAML file; flags beat it.", metavar="NAME"),
]
Device = Annotated[
    str,
    typer.Option(help="cpu, cuda, cuda:1, mps; auto takes a GPU where there is one."),
]
MaxMemory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Such as 16GB: a model whose float32 weights take more is worked on layer by layer.",
    ),
]

DataText = Annotated[
    str | None,
    typer.Option(
        "--data",
        metavar="TEXT",
        rich_help_panel=DATA,
        help="A file (.txt, .jsonl, .json, .gz, .parquet), a folder, a hub dataset, or stdlib. "
        "Its held-out part measures.",
    ),
]
MeasuredText = Annotated[
    str | None,
    typer.Option(
        "--data",
        "--eval-data",
        metavar="TEXT",
        rich_help_panel=DATA,
        help="A file (.txt, .jsonl, .json, .gz, .parquet), a folder, a hub dataset, or stdlib. "
        "Left out, the text of the run.",
    ),
]
EvalData = Annotated[
    str | None,
    typer.Option(
        "--eval-data",
        metavar="TEXT",
        rich_help_panel=DATA,
        help="Text only for measuring.",
    ),
]
TextField = Annotated[
    str | None,
    typer.Option(
        "--text-field",
        metavar="NAME",
        rich_help_panel=DATA,
        help="The field that holds the text in JSON and hub datasets.",
    ),
]
Samples = Annotated[
    int | None,
    typer.Option("--samples", min=1, rich_help_panel=DATA, help="How many sequences are read."),
]
SeqLen = Annotated[
    int | None,
    typer.Option("--seq-len", min=2, rich_help_panel=DATA, help="Tokens in each of them."),
]
Windows = Annotated[
    int | None,
    typer.Option("--windows", min=1, rich_help_panel=DATA, help="How many windows measure."),
]
Positions = Annotated[
    str | None,
    typer.Option(
        "--positions",
        metavar="LIST",
        rich_help_panel=DATA,
        help="Where the buckets of position-wise perplexity begin and end: 0,16,32,64,96,128.",
    ),
]
Seed = Annotated[
    int | None,
    typer.Option(
        "--seed", min=0, max=MOST_SEED, rich_help_panel=DATA, help="Of everything that is drawn."
    ),
]

Epochs = Annotated[
    int | None,
    typer.Option(
        "--epochs", min=1, max=MOST_EPOCHS, rich_help_panel=HEALING, help="At most so many."
    ),
]
Patience = Annotated[
    int | None,
    typer.Option(
        "--patience",
        min=1,
        rich_help_panel=HEALING,
        help="Epochs without improvement that stop it.",
    ),
]
LearningRate = Annotated[
    float | None,
    typer.Option("--learning-rate", rich_help_panel=HEALING, help="Of AdamW, above 0."),
]
BatchSize = Annotated[
    int | None,
    typer.Option("--batch-size", min=1, rich_help_panel=HEALING, help="Sequences in a step."),
]

Folder = Annotated[
    Path | None,
    typer.Option(
        "--output", "-o", metavar="DIR", rich_help_panel=OUTPUT, help="The folder to write."
    ),
]
Force = Annotated[
    bool,
    typer.Option("--force", rich_help_panel=OUTPUT, help="Replace what is in the folder."),
]
Json = Annotated[
    bool,
    typer.Option("--json", rich_help_panel=OUTPUT, help="Print one JSON document."),
]
Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", rich_help_panel=OUTPUT, help="No progress, only results."),
]
Verbose = Annotated[
    bool,
    typer.Option("--verbose", "-v", rich_help_panel=OUTPUT, help="Other libraries' warnings too."),
]
Debug = Annotated[
    bool,
    typer.Option("--debug", rich_help_panel=OUTPUT, help="The traceback of an error."),
]
