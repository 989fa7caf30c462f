"""The contract between the algorithm and a model family.

Letters: H query heads, G key/value heads, d head width, hidden the residual stream.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from vdcompress.errors import ModelError
from vdcompress.plan import ModelShape, Plan


@dataclass(frozen=True)
class Projection:
    """A linear map: ``weight`` [out, in] and ``bias`` [out] or None."""

    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class AttentionWeights:
    """One layer's projections, unpacked, heads one after another.

    Attributes:
        q: [H d, hidden].
        k: [G d, hidden].
        v: [G d, hidden].
        o: [hidden, H d].
    """

    q: Projection
    k: Projection
    v: Projection
    o: Projection


class Family(ABC):
    """Everything the algorithm must know of a family; one instance per adapter file.

    Attributes:
        model_type: ``config.model_type`` of the base.
        attention_name: name of the attention module inside a layer.
        output_name: name of the output projection inside the attention module.
        aliases: short names of well-known checkpoints and their hub ids.
        stored_as: names of tensors in checkpoints of older transformers, ``{name: older name}``.
    """

    model_type: ClassVar[str]
    attention_name: ClassVar[str]
    output_name: ClassVar[str]
    aliases: ClassVar[dict[str, str]] = {}
    stored_as: ClassVar[dict[str, str]] = {}

    @abstractmethod
    def shape(self, config: PreTrainedConfig) -> ModelShape:
        """Read the shape from a config alone."""

    @abstractmethod
    def base_class(self) -> type[PreTrainedModel]:
        """Return the transformers class of the base."""

    @abstractmethod
    def compressed_class(self) -> type[PreTrainedModel]:
        """Return the class that runs compressed weights."""

    @abstractmethod
    def compressed_body(self) -> type[PreTrainedModel]:
        """Return the class that runs compressed weights without the language modelling head."""

    @abstractmethod
    def layers_prefix(self) -> str:
        """Return what stands before a layer's number in names, such as ``model.layers``."""

    @abstractmethod
    def projection_bias(self, config: PreTrainedConfig) -> dict[str, bool]:
        """Say which of the base's ``q``, ``k``, ``v``, ``o`` have a bias."""

    @abstractmethod
    def weights(self, attention: nn.Module) -> AttentionWeights:
        """Unpack the projections of one attention module (views where possible)."""

    def layers(self, model: nn.Module) -> list[nn.Module]:
        """Return the decoder layers of a base or compressed model, in order."""
        return list(model.get_submodule(self.layers_prefix()).children())

    def attention_modules(self, model: nn.Module) -> list[nn.Module]:
        """Return the attention module of every layer, in order."""
        return [layer.get_submodule(self.attention_name) for layer in self.layers(model)]

    def output_projection(self, attention: nn.Module) -> nn.Module:
        """Return the module whose input is what attention returned, [b, t, H d]."""
        return attention.get_submodule(self.output_name)

    def parameter_prefix(self, layer: int) -> str:
        """Return what stands before the names of an attention module's parameters."""
        return f"{self.layers_prefix()}.{layer}.{self.attention_name}."

    def rotary(self, config: PreTrainedConfig) -> tuple[list[float], float]:
        """Return the inverse frequencies and the factor of cos and sin.

        Raises:
            ModelError: for RoPE whose frequencies depend on the length of the input.
        """
        kind = (config.rope_parameters or {}).get("rope_type", "default")
        if kind in ("dynamic", "longrope"):
            raise ModelError(
                f"RoPE of type {kind!r} changes its frequencies with the input's length",
                "vdcompress needs fixed frequencies",
            )
        embedding: Any = self.rotary_class()(config)
        return embedding.inv_freq.float().tolist(), float(embedding.attention_scaling)

    @abstractmethod
    def rotary_class(self) -> type[nn.Module]:
        """Return the base's rotary embedding."""

    def compressed_config(self, config: PreTrainedConfig, plan: Plan) -> PreTrainedConfig:
        """Return the compressed model's config: the base's fields and the plan's layout."""
        data = config.to_dict()
        for name in ("model_type", "architectures", "auto_map", "_name_or_path"):
            data.pop(name, None)
        inv_freq, rope_scale = self.rotary(config)
        config_class: Any = self.compressed_class().config_class
        compressed: PreTrainedConfig = config_class(
            **data
            | {
                "kv_layout": [layer.to_json() for layer in plan.layers],
                "kv_sinks": plan.sinks,
                "kv_window": plan.window,
                "inv_freq": inv_freq,
                "rope_scale": rope_scale,
                "softmax_scale": plan.shape.head_dim**-0.5,
                "base_head_dim": plan.shape.head_dim,
                "base_kv_heads": plan.shape.kv_heads,
                "projection_bias": self.compressed_bias(config, plan),
                "head_dim": plan.common(lambda la: la.k_head_dim),
                "v_head_dim": plan.common(lambda la: la.v_head_dim),
                "num_key_value_heads": _common_groups(plan),
            }
        )
        compressed.architectures = [self.compressed_class().__name__]
        return compressed

    def compressed_bias(self, config: PreTrainedConfig, plan: Plan) -> dict[str, bool]:
        """Say which projections of the compressed model have a bias.

        V and o gain one for the folded means, and so do keys that are folded and centred.
        """
        shape = plan.shape
        full = shape.head_dim - shape.rotary_dim
        folded = [layer.k_nope for layer in plan.layers if not layer.k_nope.after_rope]
        centred = any(
            nope.packed or 0 < nope.width < full * shape.kv_heads // nope.groups for nope in folded
        )
        base = self.projection_bias(config)
        return base | {"k": base["k"] or centred, "v": True, "o": True}

    def compressed_on_meta(self, config: PreTrainedConfig, plan: Plan) -> PreTrainedModel:
        """Build the compressed model without memory for its parameters."""
        compressed = self.compressed_config(config, plan)
        with torch.device("meta"):
            return self.compressed_class()(compressed)

    def base_on_meta(self, config: PreTrainedConfig) -> PreTrainedModel:
        """Build the base model without memory for its parameters."""
        with torch.device("meta"):
            return self.base_class()(config)


def _common_groups(plan: Plan) -> int | None:
    groups = plan.common(lambda la: (la.k_groups, la.v_groups))
    return groups[0] if groups and groups[0] == groups[1] else None
