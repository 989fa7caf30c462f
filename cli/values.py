"""From what was typed to what the core takes."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from vdcompress.errors import UsageError
from vdcompress.modeling.layout import BITS
from vdcompress.request import AUTO

if TYPE_CHECKING:
    from vdcompress.recipe import Recipe

DEVICES = "cpu, cuda, cuda:N, mps or auto"


def recipe_from(name: str | None, overrides: dict[str, Any]) -> Recipe:
    """Return the recipe that flags and file give together; flags beat the file."""
    from vdcompress.recipe import Recipe, load_recipe

    recipe = Recipe() if name is None else load_recipe(name)
    return recipe.merged(overrides)


def positions(text: str | None) -> tuple[int, ...] | None:
    """Read ``0,16,32``; None stays None.

    Raises:
        UsageError: not two or more ascending whole numbers.
    """
    if text is None:
        return None
    try:
        found = tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        found = ()
    if len(found) < 2 or found[0] < 0 or list(found) != sorted(set(found)):
        raise UsageError(
            f"--positions {text!r} is not a list of two or more ascending numbers",
            "like: --positions 0,16,32,64,96,128",
        )
    return found


def bits(text: str | None) -> int | str | None:
    """Read ``8`` or ``auto``; None stays None.

    Raises:
        UsageError: neither.
    """
    if text is None or text == AUTO:
        return text
    if text not in map(str, BITS):
        raise UsageError(
            f"--bits {text!r} is no number of bits", f"one of {', '.join(map(str, BITS))}, {AUTO}"
        )
    return int(text)


def size(text: str | None) -> int | None:
    """Read ``16GB``, ``500MB``, ``2GiB`` or a number of bytes; None stays None.

    Raises:
        UsageError: not a size above zero.
    """
    if text is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMGT]?)(i?)B?", text.strip(), re.IGNORECASE)
    if found is None or not float(found[1]):
        raise UsageError(f"--max-memory {text!r} is not a size", "like: --max-memory 16GB")
    power = " KMGT".index(found[2].upper() or " ")
    return int(float(found[1]) * (1024 if found[3] else 1000) ** power)


def device(text: str) -> str:
    """Return the device to use; ``auto`` takes a GPU where there is one.

    Raises:
        UsageError: unknown, or this machine has none.
    """
    import torch

    if text == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(text).type
    except RuntimeError as error:
        raise UsageError(f"--device {text!r} is not a device", f"one of {DEVICES}") from error
    if kind not in ("cpu", "cuda", "mps"):
        raise UsageError(f"--device {text!r} is not supported", f"one of {DEVICES}")
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.mps.is_available()}
    if not there[kind]:
        raise UsageError(f"this machine has no {kind} device", "leave --device out to use the CPU")
    return text
