"""Make transformers' auto classes know the compressed models, without importing transformers."""

from __future__ import annotations

from types import ModuleType

import wrapt

AUTO = "transformers.models.auto.modeling_auto"


def register_when_needed() -> None:
    """Register as soon as transformers' auto classes are imported, at once if they are."""
    wrapt.register_post_import_hook(register, AUTO)


def register(_module: ModuleType | None = None) -> None:
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
