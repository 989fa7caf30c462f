"""The fields that a compressed model's config adds to its base's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from .layout import LayerLayout


@dataclass(kw_only=True)
class LatentConfig:
    """The fields that a compressed model's config adds to its base's.

    Attributes:
        kv_layout: one :class:`LayerLayout` in JSON form for each layer.
        inv_freq: inverse frequencies of the base's rotary pairs.
        rope_scale: factor of cos and sin (1 but for some long-context variants of RoPE).
        softmax_scale: factor of the attention scores, ``1 / sqrt(d)`` of the base.
        base_head_dim: width d of the base's heads.
        base_kv_heads: key/value heads of the base.
        projection_bias: which of ``q``, ``k``, ``v``, ``o`` have a bias.
        head_dim: width of a K latent; None where layers differ.
        v_head_dim: width of a V latent; None where layers differ.
        num_key_value_heads: latents per side; None where layers or sides differ.
        kv_sinks: first tokens of a sequence that packed parts keep as they are.
        kv_window: newest tokens that they keep as they are.
    """

    kv_layout: list[dict[str, Any]] | None = None
    inv_freq: list[float] | None = None
    rope_scale: float = 1.0
    softmax_scale: float = 0.125
    base_head_dim: int = 64
    base_kv_heads: int = 8
    projection_bias: dict[str, bool] | None = None
    head_dim: int | None = None
    v_head_dim: int | None = None
    num_key_value_heads: int | None = None
    kv_sinks: int = 0
    kv_window: int = 0
    base_model_tp_plan: ClassVar[dict[str, str]] = {}

    def __post_init__(self, **kwargs: Any) -> None:
        """Keep a latent that all heads share whole on every rank of tensor parallelism."""
        layouts = [LayerLayout.from_json(layer) for layer in self.kv_layout or ()]
        whole = {"k_proj": [layout.k_groups == 1 for layout in layouts]}
        whole["v_compress"] = [layout.v_groups == 1 for layout in layouts]
        self.base_model_tp_plan = {
            name: style
            for name, style in type(self).base_model_tp_plan.items()
            if not any(whole.get(name.rsplit(".", 1)[-1], ()))
        }
        super().__post_init__(**kwargs)

    def layer_layout(self, layer: int) -> LayerLayout:
        """Return the layout of one layer."""
        if self.kv_layout is None:
            raise ValueError("this config has no kv_layout: it was not written by vdcompress")
        return LayerLayout.from_json(self.kv_layout[layer])

    @property
    def packed(self) -> bool:
        """Whether any layer's cache is packed in few bits."""
        layers = range(len(self.kv_layout or ()))
        return any(self.layer_layout(layer).packed for layer in layers)
