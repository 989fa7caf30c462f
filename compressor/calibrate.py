"""Measure a base model's activations on text: streaming moments, no activations kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from vdcompress.attention_tap import attending_by
from vdcompress.errors import DataError, ModelError, UsageError
from vdcompress.events import OnEvent, Progress, ignore
from vdcompress.families import Family
from vdcompress.load import Base
from vdcompress.plan import ModelShape
from vdcompress.statistics import LayerStatistics, MomentSum, QuerySample, Statistics

ACTIVATIONS = frozenset({"values", "keys", "queries", "outputs"})
GRADIENTS = frozenset({"value_gradients", "key_gradients", "output_gradients"})
PULLS = "query_pulls"
EVERYTHING = ACTIVATIONS | GRADIENTS | {PULLS}
JOINT = frozenset({"values", "keys", "outputs", "value_gradients", "key_gradients"})
TOKENS_PER_DIMENSION = 4
SAMPLE_BYTES = 2**31
CHUNK = 256


def calibrate(
    base: Base,
    windows: Tensor,
    *,
    needs: frozenset[str] = ACTIVATIONS,
    batch: int = 1,
    seed: int = 0,
    on_event: OnEvent = ignore,
) -> Statistics:
    """Run the base over token windows and return the moments that a start needs.

    Args:
        base: the loaded base model; it is as before when this ends, however it ends.
        windows: token ids [n, length].
        needs: names of :class:`LayerStatistics`' fields; fewer cost less time, and gradients cost
            a backward pass through the whole model.
        batch: windows per forward pass.
        seed: of the labels that are drawn from the model where gradients are needed.
        on_event: gets one :class:`Progress` per batch.

    Raises:
        UsageError: for an unknown name in ``needs``.
        DataError: for fewer tokens than the widest covariance needs (says how many it wants).
        ModelError: for a NaN or an infinity, with the name of the layer.
    """
    require_enough_tokens(base.shape, windows.numel(), needs)
    shape = base.shape
    token_bytes = 2 * 2 * shape.layers * shape.heads * shape.head_dim
    every = -(-windows.numel() * token_bytes // SAMPLE_BYTES)
    sums = [LayerSums(needs, every) for _ in range(base.shape.layers)]
    attentions = base.family.attention_modules(base.model)
    backward = bool(needs & (GRADIENTS | {PULLS}))
    device = next(base.model.parameters()).device
    labels = torch.Generator(device).manual_seed(seed)
    with listening(base.model, dict(zip(attentions, sums, strict=True))), ExitStack() as stack:
        stack.enter_context(_only_activations(base.model) if backward else torch.inference_mode())
        for start in range(0, len(windows), batch):
            ids = windows[start : start + batch].to(device)
            hidden = base.model.base_model(ids, use_cache=False).last_hidden_state
            if backward:
                hidden.backward(_pull(base.model, hidden.detach(), labels))
            require_finite(base.family, sums)
            on_event(Progress("calibrate", min(start + batch, len(windows))))
    return Statistics(tuple(layer.statistics() for layer in sums), windows.numel())


def require_enough_tokens(shape: ModelShape, tokens: int, needs: frozenset[str]) -> None:
    """Raise :class:`DataError` if a covariance would rest on too few tokens.

    The widest covariance spans all heads (or one head's queries); each of its dimensions wants
    four tokens, below which its small eigenvalues are noise.
    """
    known = {field.name for field in fields(LayerStatistics)}
    if needs - known:
        raise UsageError(f"no statistic is called {min(needs - known)!r}", ", ".join(sorted(known)))
    heads = shape.heads if "outputs" in needs else shape.kv_heads if needs & JOINT else 1
    wanted = TOKENS_PER_DIMENSION * heads * shape.head_dim if needs else 0
    if tokens < wanted:
        raise DataError(
            f"{tokens} calibration tokens are too few for a covariance of width "
            f"{heads * shape.head_dim}",
            f"it wants at least {wanted}: raise --samples or --seq-len",
        )


class LayerSums:
    """Collects one layer's statistics.

    Args:
        needs: names of :class:`LayerStatistics`' fields.
        every: which tokens' queries are kept where ``query_pulls`` is needed: each so many.
    """

    def __init__(self, needs: frozenset[str], every: int = 1) -> None:
        self.sums = {name: MomentSum() for name in needs if name != PULLS}
        self.wants_pulls, self.every = PULLS in needs, every
        self._queries: list[Tensor] = []
        self._pulls: list[Tensor] = []

    def listen(self, query: Tensor, key: Tensor, value: Tensor, output: Tensor) -> None:
        """Take query [b, H, t, d], key and value [b, G, t, d], output [b, t, H, d].

        Gradients are taken when they come, in the backward pass.
        """
        by_token = {
            "queries": (query, 1),
            "keys": (key, 1),
            "values": (value, 1),
            "outputs": (output, 2),
        }
        for name, (tensor, heads) in by_token.items():
            if name in self.sums:
                self._add(name, tensor, heads)
            gradient = f"{name.removesuffix('s')}_gradients"
            if gradient in self.sums:
                self._add_gradient(gradient, tensor, heads)
        if self.wants_pulls:
            self._sample(query)

    def _add(self, name: str, tensor: Tensor, heads: int) -> None:
        """Add a tensor whose heads are in dimension ``heads``; joint ones side by side."""
        tokens = tensor.detach().movedim(heads, 2).flatten(0, 1)
        self.sums[name].add(tokens.flatten(1) if name in JOINT else tokens)

    def _add_gradient(self, name: str, tensor: Tensor, heads: int) -> None:
        tensor.register_hook(lambda gradient: self._add(name, gradient, heads))

    def _sample(self, query: Tensor) -> None:
        """Keep some tokens' queries and what the loss pulls them by, in 16 bits."""

        def some(tensor: Tensor) -> Tensor:
            tokens = tensor.detach().transpose(0, 1).flatten(1, 2)[:, :: self.every]
            return tokens.to(torch.bfloat16)

        self._queries.append(some(query))
        query.register_hook(lambda gradient: self._pulls.append(some(gradient)))

    def unsound(self) -> str | None:
        """Return the name of a statistic that is not finite, None if all are."""
        return next((name for name, total in self.sums.items() if not total.finite()), None)

    def statistics(self) -> LayerStatistics:
        """Return what was collected."""
        found: dict[str, Any] = {name: total.moments() for name, total in self.sums.items()}
        if self.wants_pulls and self._pulls:
            found[PULLS] = QuerySample(torch.cat(self._queries, 1), torch.cat(self._pulls, 1))
        return LayerStatistics(**found)


@contextmanager
def listening(model: PreTrainedModel, layers: Mapping[nn.Module, LayerSums]) -> Iterator[None]:
    """Let each attention module's sums hear what it attends to, for the time of a block."""

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        output, _ = sdpa_attention_forward(module, query, key, value, *args, **kwargs)
        layers[module].listen(query, key, value, output)
        return output, None

    with attending_by(model, "vdcompress_calibration", attend):
        yield


@contextmanager
def _only_activations(model: PreTrainedModel) -> Iterator[None]:
    """Let gradients flow from the embeddings on, and to no parameter, for the time of a block."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    embeddings: Any = model.get_input_embeddings()
    handle = embeddings.register_forward_hook(lambda _m, _a, out: out.requires_grad_(True))
    try:
        model.requires_grad_(False)
        with torch.enable_grad():
            yield
    finally:
        handle.remove()
        for parameter in trained:
            parameter.requires_grad_(True)


def _pull(model: PreTrainedModel, hidden: Tensor, labels: torch.Generator) -> Tensor:
    """Return the gradient by ``hidden`` [b, t, hidden] of the loss against labels of the model's.

    The loss is summed over tokens: softmax minus the label, through the head. Logits are made for
    a few tokens at a time.
    """
    head: Any = model.get_output_embeddings()
    pulls = []
    for part in hidden.flatten(0, 1).split(CHUNK):
        tokens = part.requires_grad_(True)
        logits = head(tokens)
        error = logits.detach().float().softmax(-1)
        drawn = _draw(error, labels).unsqueeze(1)
        error.scatter_add_(1, drawn, error.new_full(drawn.shape, -1.0))
        pulls.append(torch.autograd.grad(logits, tokens, error.to(logits.dtype))[0])
    return torch.cat(pulls).view_as(hidden)


def _draw(probabilities: Tensor, labels: torch.Generator) -> Tensor:
    """Draw one index from each row [tokens, vocabulary] by its cumulative distribution."""
    steps = probabilities.cumsum(-1)
    places = torch.rand(len(steps), 1, generator=labels, device=steps.device) * steps[:, -1:]
    return torch.searchsorted(steps, places).squeeze(1).clamp_max(steps.shape[1] - 1)


def require_finite(family: Family, sums: list[LayerSums], first: int = 0) -> None:
    """Raise :class:`ModelError` for a statistic that is not finite.

    Args:
        family: names the layers.
        sums: of the layers from ``first`` on.
        first: number of the first layer.
    """
    for index, layer in enumerate(sums, first):
        name = layer.unsound()
        if name is not None:
            where = family.parameter_prefix(index).rstrip(".")
            raise ModelError(
                f"NaN or infinity in the attention {name} of {where}",
                "the checkpoint is damaged, or it overflows in this dtype",
            )
