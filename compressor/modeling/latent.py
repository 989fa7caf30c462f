"""What all compressed families share: config fields, rotary table, projections, cache choice."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import DynamicCache
from transformers.utils import logging

from .attention import NAME as ATTENTION
from .cache import LatentCache
from .layout import LayerLayout
from .packed_cache import cache_for
from .rounded_latents import rounded_layer

V_SIDE = ("v_compress", "o_contract", "dense", "o_proj")
K_SIDE = ("q_proj", "k_proj", "q_expand", "k_compress")

logger = logging.get_logger(__name__)
CACHE_NAMES = ("cache", "past_key_values")  # since transformers 5.24, and before


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


class LatentRotaryEmbedding(nn.Module):
    """cos and sin [b, t, pairs] of explicit inverse frequencies, in float32 whatever the model's.

    The buffer is rebuilt from the config whenever the module moves or changes its dtype, and by
    ``_init_weights`` after ``from_pretrained``, which otherwise leaves it uninitialised.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.frequencies = tuple(config.inv_freq or ())
        self.rope_scale = config.rope_scale
        self.register_buffer("inv_freq", self._table(), persistent=False)
        self.inv_freq: Tensor

    def _table(self, device: Any = None) -> Tensor:
        """Return the config's frequencies; models are built with other default dtypes too."""
        return torch.tensor(self.frequencies, dtype=torch.float32, device=device)

    def refill(self) -> None:
        """Write the config's frequencies into the buffer."""
        init.copy_(self.inv_freq, self._table(self.inv_freq.device))

    def _apply(self, fn: Any, recurse: bool = True) -> LatentRotaryEmbedding:
        if self.inv_freq.is_meta:
            self.inv_freq = self._table("cpu")
        super()._apply(fn, recurse)
        self.inv_freq = self._table(self.inv_freq.device)
        return self

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return cos and sin in the dtype of ``x`` for positions [b, t]."""
        angles = position_ids[..., None].float() * self.inv_freq
        cos, sin = angles.cos() * self.rope_scale, angles.sin() * self.rope_scale
        return cos.to(x.dtype), sin.to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first ``2 * pairs`` dimensions of ``x`` [b, h, t, width]; the rest passes.

    Args:
        x: the first members of all pairs, then the second ones, then unrotated dimensions.
        cos: [b, t, pairs].
        sin: [b, t, pairs].
    """
    pairs = cos.shape[-1]
    if pairs == 0:
        return x
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    first, second, rest = x.split([pairs, pairs, x.shape[-1] - 2 * pairs], dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)


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
        if layout.k_rotary.frequencies != tuple(range(cos.shape[-1])):
            kept: Any = list(layout.k_rotary.frequencies)
            if not torch.compiler.is_compiling():
                kept = _numbers(layout.k_rotary.frequencies, cos.device)
            cos, sin = cos[..., kept], sin[..., kept]
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


@cache
def _numbers(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """Return numbers as a tensor; made anew a GPU would wait for them in every layer."""
    with torch.inference_mode(False):
        return torch.tensor(numbers, device=device)


def _heads(x: Tensor, width: int) -> Tensor:
    """[b, t, h * width] -> [b, h, t, width], however many heads this process holds."""
    return x.unflatten(-1, (-1, width)).transpose(1, 2)


def _join_heads(x: Tensor, heads: int) -> Tensor:
    """[b, g * n, t, d] -> [b, g, t, n * d]: the keys of the n heads of a group side by side."""
    return x.unflatten(1, (-1, heads)).transpose(2, 3).flatten(-2)


def with_own_cache(model: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Give the body of a packed model its own cache where transformers would make a dynamic one.

    A forward pre-hook. Gradients do not flow through a cache, so training goes without.
    """
    uses = kwargs.get("use_cache")
    uses = model.config.use_cache if uses is None else uses
    if not uses or any(kwargs.get(name) is not None for name in CACHE_NAMES):
        return args, kwargs
    if torch.is_grad_enabled():
        return args, kwargs | {"use_cache": False}
    known = inspect.signature(model.forward).parameters
    name = next(name for name in CACHE_NAMES if name in known)
    return args, kwargs | {name: cache_for(model.config)}


class LatentModel:
    """Mixin before a transformers model class: its attention function, cache and initialisation."""

    def keep_latents_packed(self) -> None:
        """Let a forward pass of this body use the cache that its config asks for."""
        if self.config.packed:  # type: ignore[attr-defined]
            self.register_forward_pre_hook(with_own_cache, with_kwargs=True)  # type: ignore[attr-defined]

    def get_correct_attn_implementation(
        self, requested_attention: str | None, is_init_check: bool = False
    ) -> str:
        """Use our attention function unless the caller names another."""
        chosen: str = super().get_correct_attn_implementation(
            requested_attention or ATTENTION, is_init_check
        )
        return chosen

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, LatentRotaryEmbedding):
            module.refill()
        elif isinstance(module, HeadMap):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)  # type: ignore[attr-defined]
            if module.bias is not None:
                init.zeros_(module.bias)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Give ``generate()`` our cache where it would make a dynamic one.

        A cache of another kind holds what it is given, so latents in few bits are not rounded in
        it: that is another model than was measured, and is said.
        """
        given = {name for name in CACHE_NAMES if model_kwargs.get(name) is not None}
        prepared = super()._prepare_cache_for_generation(
            generation_config, model_kwargs, *args, **kwargs
        )
        for name in CACHE_NAMES:
            made = model_kwargs.get(name)
            if name not in given and isinstance(made, DynamicCache):
                model_kwargs[name] = made = cache_for(self.config, offloading=made.offloading)  # type: ignore[attr-defined]
            if self.config.packed and made is not None and not isinstance(made, LatentCache):  # type: ignore[attr-defined]
                logger.warning(
                    f"a {type(made).__name__} keeps the latents of this model in 16 bits and "
                    "rounds none: neither its bytes nor its perplexity are those that were "
                    "measured; name no cache to get the model's own"
                )
        return prepared
