"""Build a model from scratch: with random weights, or without memory for them."""

from __future__ import annotations

import hashlib

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from vdcompress import families
from vdcompress.plan import ModelShape, Plan
from vdcompress.scratch.architecture import FAMILY, Architecture
from vdcompress.scratch.restoring import RestoringGPTNeoXConfig, RestoringGPTNeoXForCausalLM


def shape_of(architecture: Architecture) -> ModelShape:
    """Return the shape that plans are made for.

    Raises:
        RecipeError: the numbers do not fit each other.
    """
    architecture.require_sound()
    return families.get(FAMILY).shape(architecture.config())


def on_meta(architecture: Architecture, plan: Plan) -> PreTrainedModel:
    """Build the model without memory for its parameters."""
    model_class, config = _kind(architecture, plan)
    with torch.device("meta"):
        return model_class(config)


def build(architecture: Architecture, plan: Plan, seed: int) -> PreTrainedModel:
    """Return the model in float32 with random weights, in evaluation mode.

    Weights are drawn as transformers draws them for GPT-NeoX (normal with ``initializer_range``,
    zero biases), but each module from a generator of its own: models that have a module of the
    same name and shape begin with the same weights in it.

    Args:
        architecture: sizes, and what becomes of values.
        plan: what its cache keeps.
        seed: of the weights.
    """
    model_class, config = _kind(architecture, plan)
    with torch.random.fork_rng(devices=[]):
        model = model_class(config)
        for name, module in model.named_modules():
            torch.manual_seed(_seed_of(name, seed))
            model._init_weights(module)
    return model.eval()


def _kind(architecture: Architecture, plan: Plan) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    """Return what runs the architecture, and its config."""
    family = families.get(FAMILY)
    config = family.compressed_config(architecture.config(), plan)
    if architecture.restore_from is None:
        return family.compressed_class(), config
    values = config.to_dict() | {"restore_from": architecture.restore_from}
    values.pop("model_type")
    return RestoringGPTNeoXForCausalLM, RestoringGPTNeoXConfig(**values)


def _seed_of(name: str, seed: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7])
