"""Every layout that the format knows runs in every family, and says what the base says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from vdcompress.load import Base
from vdcompress.modeling.cache import LatentCache
from vdcompress.modeling.layout import LayerLayout, NopePart, Part, RotaryPart
from vdcompress.plan import ModelShape, Plan

CLOSE = {"atol": 1e-4, "rtol": 1e-4}
MakeLayer = Callable[[ModelShape], LayerLayout]


def narrow(shape: ModelShape) -> LayerLayout:
    return replace(shape.full_layout(), v=Part(shape.kv_heads, 8))


def shared_v(shape: ModelShape) -> LayerLayout:
    return replace(shape.full_layout(), v=Part(1, 24, maps="per_head"))


def per_head_v(shape: ModelShape) -> LayerLayout:
    return replace(shape.full_layout(), v=Part(shape.kv_heads, 8, maps="per_head"))


def few_frequencies(shape: ModelShape) -> LayerLayout:
    return replace(shape.full_layout(), k_rotary=RotaryPart(shape.kv_heads, 2, frequencies=(1,)))


def repeated_frequencies(shape: ModelShape) -> LayerLayout:
    kept = (0, 0, 1, 1, 1)
    return LayerLayout(
        v=Part(2, 16),
        k_nope=NopePart(2, 6, maps="per_head"),
        k_rotary=RotaryPart(2, 10, frequencies=kept, maps="per_head"),
    )


def only_nope(shape: ModelShape) -> LayerLayout:
    return replace(shape.full_layout(), k_nope=NopePart(2, 24), k_rotary=RotaryPart(2, 0))


def only_rotary(shape: ModelShape) -> LayerLayout:
    return LayerLayout(Part(2, 8), NopePart(2, 0), RotaryPart(2, 4, frequencies=(0, 1)))


def per_head_k(shape: ModelShape) -> LayerLayout:
    full = shape.full_layout()
    return replace(
        full,
        k_nope=replace(full.k_nope, maps="per_head"),
        k_rotary=replace(full.k_rotary, maps="per_head"),
    )


def after_rope(shape: ModelShape) -> LayerLayout:
    return LayerLayout(
        v=Part(shape.kv_heads, 8),
        k_nope=NopePart(shape.kv_heads, 8, maps="per_head", after_rope=True),
        k_rotary=RotaryPart(shape.kv_heads, 0),
    )


def after_rope_shared(shape: ModelShape) -> LayerLayout:
    return LayerLayout(
        v=Part(1, 16),
        k_nope=NopePart(1, 24, maps="per_head", after_rope=True),
        k_rotary=RotaryPart(1, 0),
    )


def multi_query(shape: ModelShape) -> LayerLayout:
    return LayerLayout(Part(1, 24), NopePart(1, 16), RotaryPart(1, 8, frequencies=(0, 0, 1, 1)))


def shared_k(shape: ModelShape) -> LayerLayout:
    return LayerLayout(
        v=Part(shape.kv_heads, 8),
        k_nope=NopePart(1, 16, maps="per_head"),
        k_rotary=RotaryPart(1, 4, frequencies=(0, 1), maps="per_head"),
    )


LAYOUTS = (
    narrow,
    shared_v,
    per_head_v,
    few_frequencies,
    repeated_frequencies,
    only_nope,
    only_rotary,
    per_head_k,
    after_rope,
    after_rope_shared,
    multi_query,
    shared_k,
)


def make(base: Base, layers: list[LayerLayout]) -> Any:
    """Return a model of these layouts; everything but its attention is the base's."""
    plan = Plan(base.shape, tuple(layers))
    plan.validate()
    assert Plan.from_json(plan.to_json()) == plan
    config = base.family.compressed_config(base.config, plan)
    model = base.family.compressed_class()(config).eval()
    with torch.random.fork_rng():
        torch.manual_seed(5)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.15)
    attentions = tuple(base.family.parameter_prefix(layer) for layer in range(base.shape.layers))
    rest = {n: t for n, t in base.model.state_dict().items() if not n.startswith(attentions)}
    missing = model.load_state_dict(rest, strict=False).missing_keys
    assert all(name.startswith(attentions) for name in missing)
    model.tie_weights()
    return model


def logits(model: Any, ids: Tensor, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        return model(ids, **kwargs).logits


def in_chunks(model: Any, ids: Tensor, sizes: list[int]) -> tuple[Tensor, LatentCache]:
    cache = LatentCache(model.config.num_hidden_layers)
    parts = [logits(model, part, past_key_values=cache) for part in ids.split(sizes, dim=1)]
    return torch.cat(parts, dim=1), cache


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_cached_decode_equals_uncached(
    base: Base, token_windows: Tensor, layout: MakeLayer
) -> None:
    model = make(base, [layout(base.shape), narrow(base.shape)])
    ids = token_windows[:2, :24]
    expected = logits(model, ids)
    chunked, cache = in_chunks(model, ids, [9, 1, 1, 5, 1, 7])
    torch.testing.assert_close(chunked, expected, **CLOSE)
    plan = Plan(base.shape, (layout(base.shape), narrow(base.shape)))
    assert cache.nbytes() == 2 * plan.cache_bytes(24, "float32")


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
def test_every_layout_reloads_trains_and_generates(
    base: Base, token_windows: Tensor, tmp_path: Any, layout: MakeLayer
) -> None:
    model = make(base, [layout(base.shape)] * 2)
    ids = token_windows[:1, :12]
    model.save_pretrained(tmp_path)
    again, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(logits(again, ids), logits(model, ids))
    settings = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    written = again.generate(ids, **settings)
    assert torch.equal(written, model.generate(ids, use_cache=False, **settings))
    again.train()(ids, labels=ids).loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in again.parameters())


@pytest.mark.parametrize("layout", [narrow, per_head_k, after_rope, after_rope_shared, multi_query])
def test_eager_runs_every_layout(base: Base, token_windows: Tensor, layout: MakeLayer) -> None:
    model = make(base, [layout(base.shape)] * 2)
    ids = token_windows[:2, :12]
    expected = logits(model, ids)
    model.set_attn_implementation("eager")
    torch.testing.assert_close(logits(model, ids), expected, **CLOSE)


def test_scalars_of_the_config(base: Base) -> None:
    config = make(base, [multi_query(base.shape)] * 2).config
    assert (config.num_key_value_heads, config.head_dim, config.v_head_dim) == (1, 24, 24)
    config = make(base, [narrow(base.shape)] * 2).config
    assert (config.head_dim, config.v_head_dim) == (base.shape.head_dim, 8)
    config = make(base, [narrow(base.shape), multi_query(base.shape)]).config
    assert config.v_head_dim is None


# What is known to be equal. Letters as in initializers/base.py.


def attention_state(base: Base, layer: int) -> dict[str, Tensor]:
    """Return the base's unpacked projections under the names of a compressed layer."""
    weights = base.family.weights(base.family.attention_modules(base.model)[layer])
    output = base.family.output_name
    state = {}
    for name, source in (("q_proj", "q"), ("k_proj", "k"), ("v_compress", "v"), (output, "o")):
        projection = getattr(weights, source)
        state[f"{name}.weight"] = projection.weight
        if projection.bias is not None:
            state[f"{name}.bias"] = projection.bias
    return state


def fill(base: Base, model: Any, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Give each layer the base's projections after ``change``; new biases are zero."""
    for index, attention in enumerate(base.family.attention_modules(model)):
        state = attention_state(base, index)
        for name, parameter in attention.named_parameters():
            if name.endswith("bias"):
                state.setdefault(name, torch.zeros_like(parameter))
        change(state)
        attention.load_state_dict(state, strict=True)


def identities(heads: int, width: int) -> Tensor:
    return torch.eye(width).expand(heads, width, width)


def selectors(base: Base) -> Tensor:
    """[H, G d, d]: which part of the joined key/value heads a query head reads."""
    shape = base.shape
    table = torch.zeros(shape.heads, shape.kv_dim, shape.head_dim)
    for head in range(shape.heads):
        start = head // (shape.heads // shape.kv_heads) * shape.head_dim
        table[head, start : start + shape.head_dim] = torch.eye(shape.head_dim)
    return table


def same_as_base(base: Base, model: Any, ids: Tensor) -> None:
    expected = logits(base.model, ids)
    torch.testing.assert_close(logits(model, ids), expected, **CLOSE)
    torch.testing.assert_close(in_chunks(model, ids, [10, 1, 1, 12])[0], expected, **CLOSE)


def test_full_layout_is_the_base(base: Base, token_windows: Tensor) -> None:
    model = make(base, [base.shape.full_layout()] * 2)
    fill(base, model, lambda state: None)
    same_as_base(base, model, token_windows[:2, :24])


def test_identity_maps_are_the_base(base: Base, token_windows: Tensor) -> None:
    shape = base.shape
    layer = replace(per_head_k(shape), v=Part(shape.kv_heads, shape.head_dim, maps="per_head"))
    model = make(base, [layer] * 2)

    def change(state: dict[str, Tensor]) -> None:
        state["q_expand.weight"] = identities(shape.heads, shape.head_dim)
        state["o_contract.weight"] = identities(shape.heads, shape.head_dim)

    fill(base, model, change)
    same_as_base(base, model, token_windows[:2, :24])


def test_per_head_maps_equal_folded_ones(base: Base, token_windows: Tensor) -> None:
    """o_contract [H, r, d] in front of W_o is W_o D with D = o_contract^T folded in."""
    shape, output = base.shape, f"{base.family.output_name}.weight"
    torch.manual_seed(6)
    encoder = torch.randn(shape.kv_heads, 8, shape.head_dim) / 4
    maps = torch.randn(shape.heads, 8, shape.head_dim) / 4
    own, folded = make(base, [per_head_v(shape)] * 2), make(base, [narrow(shape)] * 2)

    def encode(state: dict[str, Tensor]) -> None:
        for name in ("weight", "bias"):
            if (old := state.get(f"v_compress.{name}")) is not None and len(old) == shape.kv_dim:
                by_head = old.unflatten(0, (shape.kv_heads, -1))
                state[f"v_compress.{name}"] = torch.einsum(
                    "grd,gd...->gr...", encoder, by_head
                ).flatten(0, 1)

    def keep(state: dict[str, Tensor]) -> None:
        encode(state)
        state["o_contract.weight"] = maps

    def fold(state: dict[str, Tensor]) -> None:
        encode(state)
        by_head = state[output].unflatten(1, (shape.heads, -1))
        state[output] = torch.einsum("yhd,hrd->yhr", by_head, maps).flatten(1)

    fill(base, own, keep)
    fill(base, folded, fold)
    ids = token_windows[:2, :24]
    torch.testing.assert_close(logits(own, ids), logits(folded, ids), **CLOSE)


def test_joined_values_with_selectors_are_the_base(base: Base, token_windows: Tensor) -> None:
    shape = base.shape
    layer = replace(shape.full_layout(), v=Part(1, shape.kv_dim, maps="per_head"))
    model = make(base, [layer] * 2)

    def change(state: dict[str, Tensor]) -> None:
        state["o_contract.weight"] = selectors(base)

    fill(base, model, change)
    same_as_base(base, model, token_windows[:2, :24])


def test_joined_values_folded_are_the_base(base: Base, token_windows: Tensor) -> None:
    """One value latent of all heads, each head's map folded into the output projection."""
    shape, output = base.shape, f"{base.family.output_name}.weight"
    model = make(base, [replace(shape.full_layout(), v=Part(1, shape.kv_dim))] * 2)

    def change(state: dict[str, Tensor]) -> None:
        by_head = state[output].unflatten(1, (shape.heads, -1))
        state[output] = torch.einsum("yhd,hrd->yhr", by_head, selectors(base)).flatten(1)

    fill(base, model, change)
    same_as_base(base, model, token_windows[:2, :24])


def after_rope_model(base: Base, groups: int, width: int) -> Any:
    shape = base.shape
    layer = replace(
        shape.full_layout(),
        k_nope=NopePart(groups, width, maps="per_head", after_rope=True),
        k_rotary=RotaryPart(groups, 0),
    )
    return make(base, [layer] * 2)


def test_keys_mapped_by_identity_after_rope_are_the_base(base: Base, token_windows: Tensor) -> None:
    shape = base.shape
    model = after_rope_model(base, shape.kv_heads, shape.head_dim)

    def change(state: dict[str, Tensor]) -> None:
        state["q_expand.weight"] = identities(shape.heads, shape.head_dim)
        state["k_compress.weight"] = identities(shape.kv_heads, shape.head_dim)

    fill(base, model, change)
    same_as_base(base, model, token_windows[:2, :24])


def test_keys_rotated_by_an_orthogonal_map_after_rope_are_the_base(
    base: Base, token_windows: Tensor
) -> None:
    """q R and k R have the scores of q and k; a bias of k adds one number per query to them."""
    shape = base.shape
    model = after_rope_model(base, shape.kv_heads, shape.head_dim)
    torch.manual_seed(7)
    turn = torch.linalg.qr(torch.randn(shape.kv_heads, shape.head_dim, shape.head_dim)).Q
    sharing = shape.heads // shape.kv_heads

    def change(state: dict[str, Tensor]) -> None:
        state["q_expand.weight"] = turn.repeat_interleave(sharing, dim=0)
        state["k_compress.weight"] = turn
        state["k_compress.bias"] = torch.randn(shape.kv_heads, 1, shape.head_dim)

    fill(base, model, change)
    same_as_base(base, model, token_windows[:2, :24])


def test_joined_keys_after_rope_are_the_base(base: Base, token_windows: Tensor) -> None:
    shape = base.shape
    model = after_rope_model(base, 1, shape.kv_dim)

    def change(state: dict[str, Tensor]) -> None:
        state["q_expand.weight"] = selectors(base).mT
        state["k_compress.weight"] = identities(1, shape.kv_dim)

    fill(base, model, change)
    same_as_base(base, model, token_windows[:2, :24])


def test_joined_rotary_keys_are_the_base(base: Base, token_windows: Tensor) -> None:
    """One key latent of all heads: each frequency stands once for every key/value head."""
    shape = base.shape
    pairs, rest = shape.rotary_dim // 2, shape.head_dim - shape.rotary_dim
    count = shape.kv_heads
    layer = replace(
        shape.full_layout(),
        k_nope=NopePart(1, count * rest, maps="per_head"),
        k_rotary=RotaryPart(
            1, count * 2 * pairs, frequencies=tuple(range(pairs)) * count, maps="per_head"
        ),
    )
    model = make(base, [layer] * 2)
    order = []  # of the joined latent: all first members, all second ones, then the rest
    for start, stop in ((0, pairs), (pairs, 2 * pairs), (2 * pairs, shape.head_dim)):
        for head in range(count):
            order += [head * shape.head_dim + place for place in range(start, stop)]

    def change(state: dict[str, Tensor]) -> None:
        for name in ("weight", "bias"):
            if f"k_proj.{name}" in state:
                state[f"k_proj.{name}"] = state[f"k_proj.{name}"][order]
        state["q_expand.weight"] = selectors(base)[:, order].mT

    fill(base, model, change)
    same_as_base(base, model, token_windows[:2, :24])


def test_dropped_frequencies_are_those_of_zero_keys(base: Base, token_windows: Tensor) -> None:
    """Keeping some pairs equals the base with all other dimensions of its keys at zero."""
    shape = base.shape
    pairs = shape.rotary_dim // 2
    kept = [1] if pairs < 4 else [1, 4]
    rows = [*kept, *(pairs + index for index in kept), *range(2 * pairs, shape.head_dim)]
    layer = replace(
        shape.full_layout(),
        k_rotary=RotaryPart(shape.kv_heads, 2 * len(kept), frequencies=tuple(kept)),
    )
    narrower, zeroed = make(base, [layer] * 2), make(base, [shape.full_layout()] * 2)

    def drop(state: dict[str, Tensor]) -> None:
        for side, heads in (("q", shape.heads), ("k", shape.kv_heads)):
            for name in ("weight", "bias"):
                if (old := state.get(f"{side}_proj.{name}")) is not None:
                    by_head = old.unflatten(0, (heads, -1))
                    state[f"{side}_proj.{name}"] = by_head[:, rows].flatten(0, 1)

    def zero(state: dict[str, Tensor]) -> None:
        lost = [row for row in range(shape.head_dim) if row not in rows]
        for name in ("weight", "bias"):
            if (old := state.get(f"k_proj.{name}")) is not None:
                new = old.clone().unflatten(0, (shape.kv_heads, -1))
                new[:, lost] = 0
                state[f"k_proj.{name}"] = new.flatten(0, 1)

    fill(base, narrower, drop)
    fill(base, zeroed, zero)
    ids = token_windows[:2, :24]
    torch.testing.assert_close(logits(narrower, ids), logits(zeroed, ids), **CLOSE)
