"""Ways to find latents: one file each.

A file in this folder that defines ``INITIALIZER`` is an initialiser; nothing else registers it.
"""

from __future__ import annotations

import importlib
import pkgutil

from vdcompress.errors import UsageError, did_you_mean
from vdcompress.initializers.base import Initializer

__all__ = ["Initializer", "available", "get"]
NOT_INITIALIZERS = ("base",)


def available() -> tuple[str, ...]:
    """Return the names of all initialisers."""
    names = (module.name for module in pkgutil.iter_modules(__path__))
    return tuple(sorted(name for name in names if name not in NOT_INITIALIZERS))


def get(name: str) -> Initializer:
    """Return the initialiser called ``name``.

    Raises:
        UsageError: for an unknown name.
    """
    if name not in available():
        raise UsageError(f"no initializer {name!r}", did_you_mean(name, available()))
    initializer: Initializer = importlib.import_module(f"{__name__}.{name}").INITIALIZER
    return initializer
