"""vdcompress: make the key/value cache of a pretrained language model smaller.

    load -> calibrate -> make_plan -> rewrite -> repair -> heal -> evaluate -> export

Each verb is a function of its own; ``compress`` does all of them. Importing this package registers
the compressed models with transformers' auto classes and costs nothing more until one is used.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if __name__ != "vdcompress":
    raise ImportError(f"this package is called vdcompress, not {__name__}: pip install . first")

from vdcompress.registration import register_when_needed

if TYPE_CHECKING:
    from vdcompress.artifact import Compressed, load_artifact
    from vdcompress.calibrate import calibrate
    from vdcompress.evaluate import evaluate
    from vdcompress.export import export
    from vdcompress.heal import HealSettings, heal
    from vdcompress.load import load, load_config
    from vdcompress.pipeline import compress
    from vdcompress.plan import Plan, Start, make_plan, plan_for
    from vdcompress.repair import repair
    from vdcompress.request import Request
    from vdcompress.rewrite import rewrite

__version__ = "0.1.0"
__all__ = [
    "Compressed",
    "HealSettings",
    "Plan",
    "Request",
    "Start",
    "calibrate",
    "compress",
    "evaluate",
    "export",
    "heal",
    "load",
    "load_artifact",
    "load_config",
    "make_plan",
    "plan_for",
    "repair",
    "rewrite",
]
_ROOMS = {
    "Compressed": "artifact",
    "HealSettings": "heal",
    "Plan": "plan",
    "Request": "request",
    "Start": "plan",
    "calibrate": "calibrate",
    "compress": "pipeline",
    "evaluate": "evaluate",
    "export": "export",
    "heal": "heal",
    "load": "load",
    "load_artifact": "artifact",
    "load_config": "load",
    "make_plan": "plan",
    "plan_for": "plan",
    "repair": "repair",
    "rewrite": "rewrite",
}


class _Package(ModuleType):
    """Keeps a verb in sight when the room of the same name is imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _ROOMS or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
register_when_needed()


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that ``import vdcompress`` stays light."""
    if name not in _ROOMS:
        raise AttributeError(f"module 'vdcompress' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"vdcompress.{_ROOMS[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names."""
    return [*__all__, "__version__"]
