"""A small GPT-NeoX on plain tensors, where an idea about latents costs a few lines to try.

Every projection is a tensor that may be replaced by one of another shape, all inner quantities can
be looked at with their gradients, and there are statistics that the product does not collect: keys
weighed by the attention that they receive, each head's own averages over all values, what the loss
wants of each query. ``candidates.py`` runs it; nothing here is part of the product.

Letters: b windows, t tokens, H heads of width d, g latents of a side, n = d H / g stacked numbers
per latent, r width of a latent. Weights are float32, moments and solving float64.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from vdcompress.latents import rotary
from vdcompress.latents.rotary import Pairs
from vdcompress.latents.values import Latents, ValueProblem, fold
from vdcompress.statistics import LayerStatistics, Moments, MomentSum, QuerySample

Affine = tuple[Tensor, Tensor]
Trace = dict[str, Tensor]


@dataclass(frozen=True)
class Shape:
    """What the checkpoint's config says."""

    heads: int
    head_dim: int
    hidden: int
    rotary_dim: int
    theta: float
    epsilon: float

    @property
    def pairs(self) -> int:
        """Rotated pairs of a head."""
        return self.rotary_dim // 2


@dataclass(frozen=True)
class BehindRope:
    """Maps applied to whole keys and queries after RoPE.

    Attributes:
        expand: of each query, [H, d, r].
        compress: of the stacked keys, [g, n, r].
        shift: added to what ``compress`` writes, [g, r].
    """

    expand: Tensor
    compress: Tensor
    shift: Tensor


@dataclass(frozen=True)
class Layer:
    """One layer; w is the width of a key's latent, r that of a value's.

    Attributes:
        q_weight: [H, w, hidden].
        q_bias: [H, w].
        k_weight: [g, w, hidden].
        k_bias: [g, w].
        v_weight: [g, r, hidden].
        v_bias: [g, r].
        o_weight: [H, hidden, r].
        o_bias: [hidden].
        attention_norm: weight and bias [hidden].
        mlp_norm: likewise.
        up: weight [inner, hidden], bias [inner].
        down: weight [hidden, inner], bias [hidden].
        frequencies: index of the frequency of each rotated pair; all first members of the pairs
            come first in a key, then all second ones.
        behind: maps behind RoPE, or None.
    """

    q_weight: Tensor
    q_bias: Tensor
    k_weight: Tensor
    k_bias: Tensor
    v_weight: Tensor
    v_bias: Tensor
    o_weight: Tensor
    o_bias: Tensor
    attention_norm: Affine
    mlp_norm: Affine
    up: Affine
    down: Affine
    frequencies: tuple[int, ...]
    behind: BehindRope | None = None


@dataclass(frozen=True)
class Model:
    """A whole model: embedding and head [vocabulary, hidden], final norm [hidden]."""

    shape: Shape
    layers: tuple[Layer, ...]
    embedding: Tensor
    head: Tensor
    final_norm: Affine


def load(folder: Path, device: str) -> Model:
    """Read a GPT-NeoX checkpoint with parallel residual from safetensors, as float32."""
    config = json.loads((folder / "config.json").read_text())
    if not config["use_parallel_residual"] or config["hidden_act"] != "gelu":
        raise SystemExit("the laboratory knows GPT-NeoX with parallel residual and exact GELU only")
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    rope, d = config["rope_parameters"], hidden // heads
    rotated = int(d * rope["partial_rotary_factor"])
    shape = Shape(heads, d, hidden, rotated, rope["rope_theta"], config["layer_norm_eps"])
    tensors = {
        name: tensor.float().to(device)
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }

    def affine(name: str) -> Affine:
        return tensors[f"gpt_neox.{name}.weight"], tensors[f"gpt_neox.{name}.bias"]

    def layer(index: int) -> Layer:
        at = f"layers.{index}"
        weight, bias = affine(f"{at}.attention.query_key_value")
        weight, bias = weight.view(heads, 3, d, hidden), bias.view(heads, 3, d)
        o_weight, o_bias = affine(f"{at}.attention.dense")
        projections = [part for side in range(3) for part in (weight[:, side], bias[:, side])]
        return Layer(
            *projections,
            o_weight.view(hidden, heads, d).permute(1, 0, 2).contiguous(),
            o_bias,
            attention_norm=affine(f"{at}.input_layernorm"),
            mlp_norm=affine(f"{at}.post_attention_layernorm"),
            up=affine(f"{at}.mlp.dense_h_to_4h"),
            down=affine(f"{at}.mlp.dense_4h_to_h"),
            frequencies=tuple(range(shape.pairs)),
        )

    return Model(
        shape,
        tuple(layer(index) for index in range(config["num_hidden_layers"])),
        tensors["gpt_neox.embed_in.weight"],
        tensors["embed_out.weight"],
        affine("final_layer_norm"),
    )


# ---------------------------------------------------------------- forward


def norm(x: Tensor, affine: Affine, shape: Shape) -> Tensor:
    """Layer norm of x [..., hidden]."""
    return functional.layer_norm(x, (shape.hidden,), *affine, shape.epsilon)


def rope(x: Tensor, frequencies: tuple[int, ...], shape: Shape) -> Tensor:
    """Turn the pairs of x [b, heads, t, w] by position."""
    count = len(frequencies)
    exponents = torch.arange(0, shape.rotary_dim, 2, dtype=torch.float64, device=x.device)
    speeds = (1 / shape.theta ** (exponents / shape.rotary_dim)).float()[list(frequencies)]
    angles = torch.arange(x.shape[-2], device=x.device).float()[:, None] * speeds
    first, second, still = x[..., :count], x[..., count : 2 * count], x[..., 2 * count :]
    cosine, sine = angles.cos(), angles.sin()
    turned = (first * cosine - second * sine, second * cosine + first * sine, still)
    return torch.cat(turned, dim=-1)


def attention(layer: Layer, h: Tensor, shape: Shape, trace: Trace | None = None) -> Tensor:
    """Causal attention of normed hidden states h [b, t, hidden].

    Args:
        layer: whose attention.
        h: its input.
        shape: of the base.
        trace: is filled with keys, turned_keys [b, g, t, w], values [b, g, t, r], queries,
            turned_queries [b, H, t, w], scores before scaling, weights [b, H, t, t], averages
            [b, H, t, r] and output [b, t, hidden]; their gradients are kept where there are any.
    """
    queries, keys, values = (
        torch.einsum("btc,hdc->bhtd", h, weight) + bias[:, None]
        for weight, bias in (
            (layer.q_weight, layer.q_bias),
            (layer.k_weight, layer.k_bias),
            (layer.v_weight, layer.v_bias),
        )
    )
    turned_queries = rope(queries, layer.frequencies, shape)
    turned_keys = rope(keys, layer.frequencies, shape)
    if layer.behind is not None:
        maps = layer.behind
        groups = maps.compress.shape[0]
        stacked = turned_keys.unflatten(1, (groups, -1)).transpose(2, 3).flatten(-2)
        turned_keys = torch.einsum("bgtn,gnr->bgtr", stacked, maps.compress) + maps.shift[:, None]
        turned_queries = torch.einsum("bhtd,hdr->bhtr", turned_queries, maps.expand)
    scores = turned_queries @ _for_heads(turned_keys, shape).mT
    allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=h.device).tril()
    scaled = (scores * shape.head_dim**-0.5).masked_fill(~allowed, -torch.inf)
    weights = torch.softmax(scaled, dim=-1)
    averages = weights @ _for_heads(values, shape)
    output = torch.einsum("bhtr,hcr->btc", averages, layer.o_weight) + layer.o_bias
    if trace is not None:
        trace.update(keys=keys, turned_keys=turned_keys, values=values, queries=queries)
        trace.update(turned_queries=turned_queries, scores=scores, weights=weights)
        trace.update(averages=averages, output=output)
        for found in trace.values():
            if found.requires_grad:
                found.retain_grad()
    return output


def _for_heads(x: Tensor, shape: Shape) -> Tensor:
    """Repeat latents [b, g, t, r] for the heads that read them, [b, H, t, r]."""
    return x.repeat_interleave(shape.heads // x.shape[1], dim=1)


def inner(layer: Layer, x: Tensor, shape: Shape) -> Tensor:
    """Activations of the MLP [b, t, inner] for the stream x [b, t, hidden]."""
    return functional.gelu(functional.linear(norm(x, layer.mlp_norm, shape), *layer.up))


def mlp(layer: Layer, x: Tensor, shape: Shape) -> Tensor:
    """Output of the MLP [b, t, hidden]."""
    return functional.linear(inner(layer, x, shape), *layer.down)


def attend(layer: Layer, x: Tensor, shape: Shape, trace: Trace | None = None) -> Tensor:
    """Output of attention [b, t, hidden] for the stream x."""
    return attention(layer, norm(x, layer.attention_norm, shape), shape, trace)


def block(layer: Layer, x: Tensor, shape: Shape, trace: Trace | None = None) -> Tensor:
    """One layer: attention and MLP side by side."""
    return x + attend(layer, x, shape, trace) + mlp(layer, x, shape)


def logits(model: Model, x: Tensor, traces: list[Trace] | None = None) -> Tensor:
    """Logits [b, t, vocabulary] from embeddings x [b, t, hidden]."""
    for index, layer in enumerate(model.layers):
        x = block(layer, x, model.shape, None if traces is None else traces[index])
    return norm(x, model.final_norm, model.shape) @ model.head.mT


def at_once(device: torch.device) -> int:
    """Windows in one forward."""
    return 4 if device.type == "cuda" else 1


@torch.no_grad()
def perplexity(model: Model, ids: Tensor, windows: int, length: int) -> float:
    """Perplexity of ids [tokens] in windows of ``length``, the last one perhaps shorter."""
    count = min(windows * length, len(ids) - 1)
    x, y = ids[:count], ids[1 : count + 1]
    whole = count // length * length
    batches = list(zip(x[:whole].view(-1, length), y[:whole].view(-1, length), strict=True))
    step = at_once(model.head.device)
    groups = [batches[i : i + step] for i in range(0, len(batches), step)]
    if whole < count:
        groups.append([(x[whole:], y[whole:])])
    total = 0.0
    for group in groups:
        inputs, labels = (
            torch.stack(part).to(model.head.device) for part in zip(*group, strict=True)
        )
        found = logits(model, model.embedding[inputs]).flatten(0, 1)
        total += functional.cross_entropy(found, labels.flatten(), reduction="sum").item()
    return math.exp(total / count)


# ---------------------------------------------------------------- statistics


@dataclass(frozen=True)
class LayerMoments:
    """What one layer's tokens look like, N = H d; gradients as in :func:`traced`.

    Attributes:
        keys: of all heads side by side, before RoPE: mean [N], covariance [N, N].
        turned_keys: behind RoPE.
        values: of all heads.
        queries: before RoPE.
        turned_queries: behind RoPE.
        outputs: of each head's attention output, all heads side by side.
        key_gradients: by the keys.
        turned_key_gradients: by the keys behind RoPE.
        value_gradients: by the values.
        output_gradients: by the output of the attention block, [hidden].
        keys_by_gradient: keys, a token weighing as the square of its gradient.
        turned_keys_by_gradient: likewise, behind RoPE.
        values_by_gradient: values, likewise.
        keys_by_attention: keys, a token weighing as the attention that it receives.
        turned_keys_by_attention: likewise, behind RoPE.
        averages: the values of all heads averaged by the attention of one head: [H, N], [H, N, N].
        pulls: the keys of all heads summed by the gradients of one head's scores: likewise.
        turned_pulls: likewise, behind RoPE.
    """

    keys: Moments
    turned_keys: Moments
    values: Moments
    queries: Moments
    turned_queries: Moments
    outputs: Moments
    key_gradients: Moments
    turned_key_gradients: Moments
    value_gradients: Moments
    output_gradients: Moments
    keys_by_gradient: Moments
    turned_keys_by_gradient: Moments
    values_by_gradient: Moments
    keys_by_attention: Moments
    turned_keys_by_attention: Moments
    averages: Moments
    pulls: Moments
    turned_pulls: Moments


class WeightedSum:
    """Adds up moments of tokens that do not count alike."""

    def __init__(self) -> None:
        self.count = 0
        self.weight: Tensor | float = 0.0
        self.total: Tensor | float = 0.0
        self.products: Tensor | float = 0.0

    def add(self, x: Tensor, weight: Tensor) -> None:
        """Add x [tokens, n], each token with its weight [tokens]."""
        x, weight = x.double(), weight.double()
        weighed = x * weight[:, None]
        self.count += len(x)
        self.weight = self.weight + weight.sum()
        self.total = self.total + weighed.sum(0)
        self.products = self.products + weighed.mT @ x

    def moments(self) -> Moments:
        """Return mean and covariance of all that was added."""
        mean = torch.as_tensor(self.total / self.weight)
        second = torch.as_tensor(self.products / self.weight)
        return Moments(mean, second - torch.outer(mean, mean), self.count)


def traced(model: Model, windows: Tensor, seed: int) -> Iterator[list[Trace]]:
    """Yield every layer's trace with gradients, window by window of windows [count, t].

    The gradients are of the window's loss, summed over its tokens, against labels drawn from the
    model itself, so that their second moments are Fisher information.
    """
    device = model.head.device
    generator = torch.Generator(device=device).manual_seed(seed)
    for window in windows:
        traces: list[Trace] = [{} for _ in model.layers]
        embedded = model.embedding[window[None].to(device)].detach().requires_grad_(True)
        found = logits(model, embedded, traces)[0]
        drawn = torch.multinomial(torch.softmax(found.detach(), -1), 1, generator=generator)[:, 0]
        functional.cross_entropy(found, drawn, reduction="sum").backward()
        yield traces


def measure(model: Model, windows: Tensor, seed: int = 0) -> tuple[LayerMoments, ...]:
    """Measure every layer on windows [count, t]."""
    names = [field.name for field in fields(LayerMoments)]
    sums: list[dict[str, MomentSum | WeightedSum]] = [
        {name: WeightedSum() if "_by_" in name else MomentSum() for name in names}
        for _ in model.layers
    ]
    for traces in traced(model, windows, seed):
        for layer, trace in zip(sums, traces, strict=True):
            for name, found in _observed(trace).items():
                layer[name].add(*found)
    return tuple(LayerMoments(**{name: layer[name].moments() for name in names}) for layer in sums)


def _observed(trace: Trace) -> dict[str, tuple[Tensor, ...]]:
    """Return, by the names of :class:`LayerMoments`, one window's x [t, ..., n] and weights [t]."""
    flat = {
        name: _side_by_side(trace[name].detach())
        for name in ("keys", "turned_keys", "values", "queries", "turned_queries", "averages")
    }
    slopes = {name: _side_by_side(trace[name].grad) for name in ("keys", "turned_keys", "values")}
    keys, turned, values = (flat[name] for name in ("keys", "turned_keys", "values"))
    received = trace["weights"].detach().sum((1, 2))[0]
    by_key, by_value = (slopes[name].square().sum(-1) for name in ("keys", "values"))
    looks, wishes = trace["weights"].detach()[0], trace["scores"].grad[0]
    return {
        **{name: (flat[name],) for name in flat if name != "averages"},
        "outputs": (flat["averages"],),
        "key_gradients": (slopes["keys"],),
        "turned_key_gradients": (slopes["turned_keys"],),
        "value_gradients": (slopes["values"],),
        "output_gradients": (trace["output"].grad[0],),
        "keys_by_gradient": (keys, by_key),
        "turned_keys_by_gradient": (turned, by_key),
        "values_by_gradient": (values, by_value),
        "keys_by_attention": (keys, received),
        "turned_keys_by_attention": (turned, received),
        "averages": ((looks @ values).transpose(0, 1),),
        "pulls": ((wishes @ keys).transpose(0, 1),),
        "turned_pulls": ((wishes @ turned).transpose(0, 1),),
    }


def _side_by_side(x: Tensor | None) -> Tensor:
    """[1, heads, t, w] -> [t, heads w]."""
    assert x is not None
    return x[0].transpose(0, 1).flatten(1)


def query_samples(model: Model, windows: Tensor, seed: int = 7) -> tuple[QuerySample, ...]:
    """Return each layer's queries and pulls before RoPE, of all tokens, [H, tokens, d] float32."""
    found: list[list[QuerySample]] = [[] for _ in model.layers]
    for traces in traced(model, windows, seed):
        for layer, trace in zip(found, traces, strict=True):
            queries = trace["queries"]
            layer.append(QuerySample(queries.detach()[0], queries.grad[0]))
    return tuple(
        QuerySample(
            torch.cat([part.queries for part in layer], 1),
            torch.cat([part.pulls for part in layer], 1),
        )
        for layer in found
    )


# ---------------------------------------------------------------- new weights


def fold_keys(
    layer: Layer, shape: Shape, pairs: Pairs, encoder: Tensor, decoder: Tensor, center: Tensor
) -> Layer:
    """Fold latents of keys into the projections of a whole layer.

    Args:
        layer: of the base.
        shape: of the base.
        pairs: maps of the rotated pairs.
        encoder: E of the other dimensions, [g, r, n'].
        decoder: D [g, n', r].
        center: taken away from the stacked other dimensions, [g, n'].
    """
    groups, rotated = len(encoder), shape.rotary_dim
    k_weight, k_bias = layer.k_weight.double(), layer.k_bias.double()
    q_weight, q_bias = layer.q_weight.double(), layer.q_bias.double()
    turned_k = rotary.write(k_weight, k_bias, pairs, rotated, groups)
    turned_q = rotary.read(q_weight, q_bias, pairs, rotated, 1)
    stacked = k_weight[:, rotated:].unflatten(0, (groups, -1)).flatten(1, 2)
    biases = k_bias[:, rotated:].unflatten(0, (groups, -1)).flatten(1) - center
    reads = decoder.unflatten(1, (shape.heads // groups, -1)).flatten(0, 1)
    return replace(
        layer,
        k_weight=torch.cat((turned_k[0], encoder @ stacked), 1).float(),
        k_bias=torch.cat((turned_k[1], torch.einsum("grn,gn->gr", encoder, biases)), 1).float(),
        q_weight=torch.cat((turned_q[0], reads.mT @ q_weight[:, rotated:]), 1).float(),
        q_bias=torch.cat(
            (turned_q[1], torch.einsum("hdr,hd->hr", reads, q_bias[:, rotated:])), 1
        ).float(),
        frequencies=pairs.frequencies,
    )


def keys_behind_rope(layer: Layer, encoder: Tensor, decoder: Tensor, center: Tensor) -> Layer:
    """Put maps behind RoPE: E [g, r, n], D [g, n, r], centre [g, n] of the turned keys."""
    joined = layer.k_weight.shape[0] // len(encoder)
    maps = BehindRope(
        expand=decoder.unflatten(1, (joined, -1)).flatten(0, 1).float(),
        compress=encoder.mT.float(),
        shift=-torch.einsum("grn,gn->gr", encoder, center).float(),
    )
    return replace(layer, behind=maps)


def value_problem(layer: Layer, shape: Shape, groups: int, width: int) -> ValueProblem:
    """Return the product's view of a base layer's V path, float64, without statistics."""
    return ValueProblem(
        v_weight=layer.v_weight.double().reshape(groups, -1, shape.hidden),
        v_bias=layer.v_bias.double().reshape(groups, -1),
        o_weight=layer.o_weight.double(),
        o_bias=layer.o_bias.double(),
        width=width,
        statistics=LayerStatistics(),
        generator=torch.Generator(),
    )


def fold_values(layer: Layer, shape: Shape, latents: Latents) -> Layer:
    """Fold latents of values into the projections of a base layer."""
    groups, width, _n = latents.encoder.shape
    found = fold(value_problem(layer, shape, groups, width), latents)
    return replace(
        layer,
        v_weight=found.v_weight.unflatten(0, (groups, -1)).float(),
        v_bias=found.v_bias.unflatten(0, (groups, -1)).float(),
        o_weight=split_output(found.o_weight, shape.heads).float(),
        o_bias=found.o_bias.float(),
    )


def split_output(o_weight: Tensor, heads: int) -> Tensor:
    """[hidden, H r] -> [H, hidden, r]."""
    return o_weight.unflatten(1, (heads, -1)).permute(1, 0, 2).contiguous()


# ---------------------------------------------------------------- repair


@dataclass(frozen=True)
class Repair:
    """How the projections that write to the stream are fitted to what the base writes.

    Attributes:
        sequential: run the compressed layer on the compressed model's stream, not the base's.
        corrected: ask it to write what the layers before it left out, too.
        block: refit the MLP's down projection together with the attention's output projection.
        ridge: pull towards the weights before repair, times the features' mean variance.
    """

    sequential: bool = False
    corrected: bool = False
    block: bool = False
    ridge: float = 1e-6


@torch.no_grad()
def repair(base: Model, compressed: Model, windows: Tensor, how: Repair) -> Model:
    """Refit a compressed model, layer after layer, on windows [count, t]."""
    device, shape = base.head.device, base.shape
    theirs = [base.embedding[part.to(device)] for part in windows.split(at_once(device))]
    ours = list(theirs)
    layers = []
    for old, new in zip(base.layers, compressed.layers, strict=True):
        both = MomentSum()
        for x, y in zip(theirs, ours, strict=True):
            both.add(torch.cat(_features_and_target(old, new, x, y, shape, how), -1).flatten(0, 1))
        fitted = _refit(new, both.moments(), shape, how)
        layers.append(fitted)
        theirs = [block(old, x, shape) for x in theirs]
        ours = [block(fitted, y, shape) for y in ours] if how.sequential else list(theirs)
    return replace(compressed, layers=tuple(layers))


def _features_and_target(
    old: Layer, new: Layer, x: Tensor, y: Tensor, shape: Shape, how: Repair
) -> tuple[Tensor, ...]:
    """Return features [b, t, n] and what they should give [b, t, hidden], in float64.

    ``x`` is the base's stream, ``y`` the one that the compressed layer runs on.
    """
    trace: Trace = {}
    attend(new, y, shape, trace)
    target = attend(old, x, shape)
    features = [trace["averages"].transpose(1, 2).flatten(2)]
    if how.corrected:
        target = target + (x - y) + mlp(old, x, shape)
        if not how.block:
            target = target - mlp(new, y, shape)
    if how.block:
        features.append(inner(new, y, shape))
    return *(part.double() for part in features), target.double()


def _refit(layer: Layer, both: Moments | None, shape: Shape, how: Repair) -> Layer:
    """Regress the target on the features, the last and the first dimensions of ``both``."""
    assert both is not None
    prior = layer.o_weight.double().transpose(0, 1).flatten(1)
    width = prior.shape[1]
    if how.block:
        prior = torch.cat((prior, layer.down[0].double()), 1)
    count = prior.shape[1]
    within, cross = both.covariance[:count, :count], both.covariance[count:, :count]
    ridge = how.ridge * within.diagonal().mean()
    damped = within + ridge * torch.eye(count).to(within)
    weight = torch.linalg.solve(damped, (cross + ridge * prior).mT).mT
    bias = (both.mean[count:] - weight @ both.mean[:count]).float()
    o_weight = split_output(weight[:, :width], shape.heads).float()
    if not how.block:
        return replace(layer, o_weight=o_weight, o_bias=bias)
    down = weight[:, width:].float().contiguous(), bias
    return replace(layer, o_weight=o_weight, o_bias=torch.zeros_like(bias), down=down)
