"""The projections of a layer whose cache holds latents, for all families."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .rope import of_frequencies, rotate
from .rounded_latents import rounded_layer

V_SIDE = ("v_compress", "o_contract", "dense", "o_proj")
K_SIDE = ("q_proj", "k_proj", "q_expand", "k_compress")


class HeadMap(nn.Module):
    """One small matrix per head or group: [b, h, t, i] -> [b, h, t, o]."""

    def __init__(self, heads: int, inputs: int, outputs: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads, inputs, outputs))
        self.bias = nn.Parameter(torch.empty(heads, 1, outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Apply each head's own matrix, and its bias if there is one."""
        if x.shape[1] != self.weight.shape[0]:
            raise ValueError(
                f"maps for {self.weight.shape[0]} heads met {x.shape[1]}: tensor parallelism does "
                "not cut maps per head; 'vdcompress export --for vllm' folds what it can, and "
                "vdcompress's plugin for vLLM cuts the others"
            )
        y = torch.einsum("bhti,hio->bhto", x, self.weight)
        return y if self.bias is None else y + self.bias


class LatentAttention(nn.Module):
    """Projections of one layer; a family adds ``forward`` and names the output projection.

    ``q_proj`` and ``k_proj`` write K's width where the layout is folded, else the base's, followed
    by ``q_expand`` (and ``k_compress`` for keys compressed after RoPE). ``v_compress`` writes the V
    latents. ``o_contract`` takes what attention returns back to the base's heads where the V map
    is not folded into the output projection.
    """

    def __init__(self, config: Any, layer_idx: int, output_name: str) -> None:
        super().__init__()
        layout = config.layer_layout(layer_idx)
        heads, d = config.num_attention_heads, config.base_head_dim
        self.config, self.layer_idx, self.layout = config, layer_idx, layout
        self.head_dim = layout.k_head_dim
        self.v_head_dim = layout.v_head_dim
        self.num_key_value_groups = heads // max(layout.k_groups, layout.v_groups)
        self.scaling = config.softmax_scale
        self.is_causal = True
        self.attention_dropout = config.attention_dropout
        self.q_expand = self.k_compress = self.o_contract = None
        bias = {"q": False, "k": False, "v": False, "o": False} | (config.projection_bias or {})
        q_width, k_dim = layout.k_head_dim, layout.k_groups * layout.k_head_dim
        if layout.k_maps == "per_head":
            q_width = d
            self.q_expand = HeadMap(heads, d, layout.k_head_dim)
        if layout.k_nope.after_rope:
            k_dim = config.base_kv_heads * d
            joined = config.base_kv_heads // layout.k_groups * d
            self.k_compress = HeadMap(layout.k_groups, joined, layout.k_head_dim, bias=True)
        o_width = layout.v_head_dim
        if layout.v.maps == "per_head":
            o_width = d
            self.o_contract = HeadMap(heads, layout.v_head_dim, d)
        hidden = config.hidden_size
        self.q_proj = nn.Linear(hidden, heads * q_width, bias=bias["q"])
        self.k_proj = nn.Linear(hidden, k_dim, bias=bias["k"])
        self.v_compress = nn.Linear(hidden, layout.v_dim, bias=bias["v"])
        self.dense: Any
        self.o_proj: Any
        setattr(self, output_name, nn.Linear(heads * o_width, hidden, bias=bias["o"]))

    def changed_projections(self) -> tuple[str, ...]:
        """Return the projections of the sides that keep fewer dimensions than the base."""
        full = self.config.base_kv_heads * self.config.base_head_dim
        v_side = V_SIDE if self.layout.v_dim < full else ()
        return v_side + (K_SIDE if self.layout.k_dim < full else ())

    def latents(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Map [b, t, hidden] to query [b, h, t, k], key [b, g, t, k] and value [b, g', t, v]."""
        layout, d = self.layout, self.config.base_head_dim
        self._require_plugin()
        cos, sin = position_embeddings
        query_width = layout.k_head_dim if self.q_expand is None else d
        query = _heads(self.q_proj(hidden_states), query_width)
        value = _heads(self.v_compress(hidden_states), layout.v_head_dim)
        if self.k_compress is not None:
            key = _heads(self.k_proj(hidden_states), d)
            query, key = rotate(query, cos, sin), rotate(key, cos, sin)
            key = self.k_compress(_join_heads(key, self.config.base_kv_heads // layout.k_groups))
            return self._expand(query), key, value
        cos, sin = of_frequencies(cos, sin, layout.k_rotary.frequencies)
        key = _heads(self.k_proj(hidden_states), layout.k_head_dim)
        return rotate(self._expand(query), cos, sin), rotate(key, cos, sin), value

    def _require_plugin(self) -> None:
        """Raise :class:`ValueError` where vLLM alone would pad V, or take one width for all."""
        alike = self.head_dim == self.v_head_dim == self.config.head_dim
        if self.config._attn_implementation == "vllm" and not alike:
            raise ValueError(
                "vLLM alone takes K and V equally wide, in all layers alike; for this model "
                "install its plugin beside it: pip install vdcompress"
            )

    def remembered(self, key: Tensor, value: Tensor, cache: Any) -> tuple[Any, Any]:
        """Return what attention reads: all that is in the cache, these latents now among them.

        Without a cache they are rounded as a packed one would, so that training and a forward pass
        see the same numbers as ``generate()``. A cache of another kind than this model's own holds
        what it is given.
        """
        if cache is not None:
            return cache.update(key, value, self.layer_idx)
        if not self.layout.packed:
            return key, value
        config = self.config
        return rounded_layer(key, value, self.layout, config.kv_sinks, config.kv_window)

    def _expand(self, query: Tensor) -> Tensor:
        return query if self.q_expand is None else self.q_expand(query)

    def contract(self, attended: Tensor) -> Tensor:
        """Return what the output projection takes [b, t, h * width] for [b, t, h, v]."""
        if self.o_contract is not None:
            attended = self.o_contract(attended.transpose(1, 2)).transpose(1, 2)
        return attended.flatten(-2)


def _heads(x: Tensor, width: int) -> Tensor:
    """[b, t, h * width] -> [b, h, t, width], however many heads this process holds."""
    return x.unflatten(-1, (-1, width)).transpose(1, 2)


def _join_heads(x: Tensor, heads: int) -> Tensor:
    """[b, g * n, t, d] -> [b, g, t, n * d]: the keys of the n heads of a group side by side."""
    return x.unflatten(1, (-1, heads)).transpose(2, 3).flatten(-2)
