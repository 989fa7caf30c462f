"""Make transformers' auto classes know the compressed models, without importing transformers."""

from __future__ import annotations

import pkgutil
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import wrapt

AUTO = "transformers.models.auto.configuration_auto"
PREFIX = "vdcompress_"


def register_when_needed() -> None:
    """Announce the model types to transformers' auto classes, whenever these are imported.

    Nothing else is imported until a model type is asked for: transformers may be in the middle of
    its own imports when it imports its auto classes.
    """
    wrapt.register_post_import_hook(_announce, AUTO)
    for name in family_names():
        wrapt.register_post_import_hook(partial(_register, name), f"vdcompress.modeling.{name}")


def register(*names: str) -> None:
    """Register configs, bodies and causal language models of these families, of all if none."""
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    from vdcompress import families

    for name in names or families.available():
        family = families.get(name)
        causal, body = family.compressed_class(), family.compressed_body()
        config: Any = causal.config_class
        AutoConfig.register(config.model_type, config, exist_ok=True)
        AutoModel.register(config, body, exist_ok=True)
        AutoModelForCausalLM.register(config, causal, exist_ok=True)


def family_names() -> set[str]:
    """Return what ``families.available()`` does, without importing the families."""
    modules = pkgutil.iter_modules([str(Path(__file__).parent / "families")])
    return {module.name for module in modules} - {"base"}


def _register(name: str, _module: ModuleType) -> None:
    register(name)


def _announce(auto: ModuleType) -> None:
    mapping = auto.CONFIG_MAPPING
    mapping._extra_content = _Announced(mapping._extra_content)


class _Announced(dict[str, Any]):
    """Registered configs by model type; ours are registered when they are first asked for."""

    def __init__(self, registered: dict[str, Any]) -> None:
        super().__init__(registered)
        self.ours = {PREFIX + name: name for name in family_names()}

    def __contains__(self, key: object) -> bool:
        return super().__contains__(key) or key in self.ours

    def __missing__(self, key: str) -> Any:
        register(self.ours[key])
        return dict(self)[key]
