"""Make transformers' auto classes know the compressed models, without importing transformers."""

from __future__ import annotations

import pkgutil
import sys
from pathlib import Path
from types import ModuleType

import wrapt

AUTO = "transformers.models.auto.configuration_auto"


def register_when_needed() -> None:
    """Register once transformers' auto classes are imported, at once if they are.

    Where they are imported in the middle of another import that a family needs, registering waits
    for the next of the modules below.
    """
    attempt = _Attempt()
    for name in (AUTO, "transformers.models.auto.modeling_auto", "transformers.modeling_utils"):
        wrapt.register_post_import_hook(attempt, name)
    for module in pkgutil.iter_modules([str(Path(__file__).parent / "families")]):
        for room in ("configuration", "modeling"):
            name = f"transformers.models.{module.name}.{room}_{module.name}"
            wrapt.register_post_import_hook(attempt, name)


def register() -> None:
    """Register every family's config, body and causal language model."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    from vdcompress import families

    for name in families.available():
        family = families.get(name)
        causal, body = family.compressed_class(), family.compressed_body()
        config = causal.config_class
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModel.register(config, body, exist_ok=True)
        AutoModelForCausalLM.register(config, causal, exist_ok=True)


class _Attempt:
    """Registers when it can; what registering itself imports does not call it again."""

    def __init__(self) -> None:
        self._busy = False
        self._done = False

    def __call__(self, _module: ModuleType) -> None:
        if self._busy or self._done or AUTO not in sys.modules:
            return
        self._busy = True
        try:
            register()
            self._done = True
        except ImportError:
            return
        finally:
            self._busy = False
