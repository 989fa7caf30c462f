"""Model families: one adapter file each, chosen by ``config.model_type``.

A file in this folder that defines ``FAMILY`` is a family; nothing else registers it.
"""

from __future__ import annotations

import importlib
import pkgutil

from vdcompress.errors import ModelError
from vdcompress.families.base import Family

__all__ = ["COMPRESSED_PREFIX", "Family", "available", "get"]

COMPRESSED_PREFIX = "vdcompress_"


def available() -> tuple[str, ...]:
    """Return the ``model_type`` of every family."""
    names = (module.name for module in pkgutil.iter_modules(__path__))
    return tuple(sorted(name for name in names if name != "base"))


def get(model_type: str) -> Family:
    """Return the adapter for a ``model_type``.

    Raises:
        ModelError: for a model that is compressed already or that no family handles.
    """
    if model_type.startswith(COMPRESSED_PREFIX):
        raise ModelError(
            "this checkpoint is compressed already", "start from the original model instead"
        )
    if model_type not in available():
        raise ModelError(
            f"no family handles model_type {model_type!r}",
            f"families: {', '.join(available())}; CONTRIBUTING.md shows how to add one",
        )
    module = importlib.import_module(f"{__name__}.{model_type}")
    family: Family = module.FAMILY
    return family
