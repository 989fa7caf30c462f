"""Measure what compression costs: token perplexity, by position, and the distance to the base.

Protocol: non-overlapping windows of ``window`` inputs, each of which predicts the next ``window``
tokens (the last of them is the first input of the next window); the first ``windows`` of the text,
a shorter last one counts; mean over tokens; no cache, but for models whose latents are packed:
these are measured through their own cache, where every token is written before it is read.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vdcompress.errors import DataError, UsageError
from vdcompress.events import OnEvent, Progress, ignore
from vdcompress.loss_sums import Bucket, Evaluation, LossSums

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "Bucket",
    "Evaluation",
    "LossSums",
    "check_evaluation",
    "check_positions",
    "count_windows",
    "evaluate",
    "evaluate_windows",
]
POSITIONS = (0, 16, 32, 64, 96, 128)
CHUNK = 256


def count_windows(tokens: int, *, window: int = 2048, windows: int = 24) -> int:
    """Return how many windows a text of so many tokens has, at most ``windows``."""
    return min(windows, math.ceil((tokens - 1) / window))


def evaluate(
    model: PreTrainedModel,
    tokens: Tensor,
    *,
    base: PreTrainedModel | None = None,
    window: int = 2048,
    windows: int = 24,
    positions: Sequence[int] = POSITIONS,
    batch: int = 1,
    through_cache: bool = True,
    on_event: OnEvent = ignore,
) -> Evaluation:
    """Measure a model, and the base beside it, on one text.

    Memory on top of the models: the hidden states of one batch of windows, and three matrices of
    :data:`CHUNK` rows of logits.

    Args:
        model: any causal language model with ``base_model`` and output embeddings.
        tokens: the text, int64, shape [n].
        base: the model before compression, on the same device.
        window: inputs per window.
        windows: most windows to use.
        positions: edges of the buckets in which perplexity is also given, increasing.
        batch: windows per forward pass.
        through_cache: packed latents are written to the model's cache and read back; False rounds
            them as that would and keeps none, which gives the same numbers, on a CPU much faster.
        on_event: gets a :class:`Progress` of stage ``evaluate`` after each batch.

    Raises:
        DataError: the text is shorter than one window.
        UsageError: the edges do not increase.
        ModelError: a loss is NaN or infinite; names the model and the window.
    """
    check_evaluation(tokens, window, positions)
    total = LossSums(window, with_base=base is not None)
    batches = _batches(tokens, window, windows, batch)
    _add_all(total, model, base, batches, on_event, through_cache=through_cache)
    return total.evaluation(positions)


def evaluate_windows(
    model: PreTrainedModel,
    windows: Tensor,
    *,
    positions: Sequence[int] = POSITIONS,
    batch: int = 8,
    on_event: OnEvent = ignore,
) -> Evaluation:
    """Measure a model on separate windows, in which each token predicts the next.

    Args:
        model: as in :func:`evaluate`.
        windows: token ids, int64, shape [n, length]; ``length - 1`` of each are inputs.
        positions: edges of the buckets in which perplexity is also given, increasing.
        batch: windows per forward pass.
        on_event: gets a :class:`Progress` of stage ``evaluate`` after each batch.

    Raises:
        UsageError: the edges do not increase.
        ModelError: a loss is NaN or infinite; names the window.
    """
    check_positions(positions)
    total = LossSums(windows.shape[1] - 1, with_base=False)
    pairs = ((part[:, :-1], part[:, 1:]) for part in windows.split(batch))
    _add_all(total, model, None, pairs, on_event)
    return total.evaluation(positions)


def _add_all(
    total: LossSums,
    model: PreTrainedModel,
    base: PreTrainedModel | None,
    batches: Iterable[tuple[Tensor, Tensor]],
    on_event: OnEvent,
    *,
    through_cache: bool = True,
) -> None:
    """Add the losses of batches of inputs and their next tokens, both [b, t]."""
    with torch.inference_mode(), _evaluating(model, base):
        for inputs, targets in batches:
            pair = inputs.to(model.device), targets.to(model.device)
            total.add(_losses(model, base, *pair, through_cache=through_cache))
            on_event(Progress("evaluate", total.windows, f"ppl {total.perplexity():.4g}"))


def check_evaluation(tokens: Tensor, window: int, positions: Sequence[int]) -> None:
    """Raise :class:`DataError` for a text shorter than a window, :class:`UsageError` for edges."""
    if len(tokens) <= window:
        raise DataError(
            f"the evaluation text is too short: {len(tokens):,} tokens, "
            f"{window + 1:,} are needed for one window of {window:,}",
            "give a longer text or a smaller --seq-len",
        )
    check_positions(positions)


def check_positions(positions: Sequence[int]) -> None:
    """Raise :class:`UsageError` unless these are two or more increasing edges."""
    edges = list(positions)
    if len(edges) < 2 or edges[0] < 0 or edges != sorted(set(edges)):
        raise UsageError(f"positions {edges} are not increasing edges", "like 0,16,32,64,96,128")


@contextmanager
def _evaluating(*models: PreTrainedModel | None) -> Iterator[None]:
    """Switch dropout off and put each model back into the mode it had."""
    modes = [(model, model.training) for model in models if model is not None]
    for model, _ in modes:
        model.eval()
    try:
        yield
    finally:
        for model, training in modes:
            model.train(training)


def _batches(
    tokens: Tensor, window: int, windows: int, batch: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield inputs and their next tokens, both [b, t]; a shorter last window comes alone."""
    used = tokens[: windows * window + 1]
    full = (len(used) - 1) // window
    inputs = used[: full * window].view(full, window)
    targets = used[1 : full * window + 1].view(full, window)
    yield from zip(inputs.split(batch), targets.split(batch), strict=True)
    if len(used) - 1 > full * window:
        yield used[full * window : -1][None], used[full * window + 1 :][None]


def _losses(
    model: PreTrainedModel,
    base: PreTrainedModel | None,
    inputs: Tensor,
    targets: Tensor,
    *,
    through_cache: bool,
) -> dict[str, Tensor]:
    """Return the losses of each predicted token, float32 [b, t], for the model, base and KL."""
    ours = _hidden(model, inputs, through_cache=through_cache)
    theirs = None if base is None else _hidden(base, inputs)
    parts: dict[str, list[Tensor]] = {"model": []}
    if base is not None:
        parts |= {"base": [], "kl": []}
    for start in range(0, targets.numel(), CHUNK):
        chunk = slice(start, start + CHUNK)
        labels = targets.reshape(-1)[chunk]
        logits = _logits(model, ours[chunk])
        norm = logits.logsumexp(-1)
        parts["model"].append(norm - _at(logits, labels))
        if base is not None and theirs is not None:
            base_logits = _logits(base, theirs[chunk])
            base_norm = base_logits.logsumexp(-1)
            parts["base"].append(base_norm - _at(base_logits, labels))
            parts["kl"].append(_kl(base_logits, base_norm, logits, norm))
    return {name: torch.cat(part).view(targets.shape) for name, part in parts.items()}


def _hidden(model: PreTrainedModel, inputs: Tensor, *, through_cache: bool = True) -> Tensor:
    """Run the body once, through its cache if that is packed; returns [b * t, hidden]."""
    packed = bool(getattr(getattr(model, "config", None), "packed", False))
    output = model.base_model(input_ids=inputs, use_cache=packed and through_cache)
    return torch.as_tensor(output.last_hidden_state).flatten(0, 1)


def _logits(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    logits: Tensor = model.get_output_embeddings()(hidden)
    return logits if logits.dtype == torch.float64 else logits.float()


def _at(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.gather(-1, labels[:, None])[:, 0]


def _kl(p: Tensor, p_norm: Tensor, q: Tensor, q_norm: Tensor) -> Tensor:
    """KL(p || q) of each row of logits [n, vocabulary]; both are overwritten."""
    q.neg_().add_(p)
    p.sub_(p_norm[:, None]).exp_()
    divergence: Tensor = torch.linalg.vecdot(p, q)
    return divergence - p_norm + q_norm
