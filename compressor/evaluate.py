"""Measure what compression costs: token perplexity, by position, and the distance to the base.

Protocol: non-overlapping windows of ``window`` inputs, each of which predicts the next ``window``
tokens (the last of them is the first input of the next window); the first ``windows`` of the text,
a shorter last one counts; mean over tokens; no cache, but for models whose latents are packed:
these are measured through their own cache, where every token is written before it is read.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vdcompress.errors import DataError, ModelError, UsageError
from vdcompress.events import OnEvent, Progress, ignore

if TYPE_CHECKING:
    from transformers import PreTrainedModel

POSITIONS = (0, 16, 32, 64, 96, 128)
CHUNK = 256


@dataclass(frozen=True)
class Bucket:
    """Perplexity of the positions ``start`` to ``stop - 1`` of all windows.

    Attributes:
        start: first position in the window; position 0 predicts from one token.
        stop: one past the last.
        base: of the base model, None if it was not given.
        compressed: of the model measured.
    """

    start: int
    stop: int
    base: float | None
    compressed: float


@dataclass(frozen=True)
class Evaluation:
    """What :func:`evaluate` measured.

    Attributes:
        perplexity: exp of the mean cross-entropy per predicted token.
        base_perplexity: of the base on the same tokens, None if it was not given.
        kl: mean over tokens of KL(base || model) in nats, None without a base.
        tokens: predicted tokens.
        window: inputs per window.
        positions: perplexity by position in the window.
    """

    perplexity: float
    base_perplexity: float | None
    kl: float | None
    tokens: int
    window: int
    positions: tuple[Bucket, ...]

    @property
    def ratio(self) -> float | None:
        """Perplexity over that of the base, None without a base."""
        return None if self.base_perplexity is None else self.perplexity / self.base_perplexity

    def to_json(self, *, data: str | None = None, healed: bool = False) -> dict[str, Any]:
        """Return the fields ``perplexity`` and ``positions`` of the program's JSON.

        Args:
            data: name of the text.
            healed: the model was finetuned after compression, so its figure is ``healed``.
        """
        perplexity = {
            "base": self.base_perplexity,
            "compressed": None if healed else self.perplexity,
            "healed": self.perplexity if healed else None,
            "ratio": self.ratio,
            "kl": self.kl,
            "tokens": self.tokens,
            "window": self.window,
            "data": data,
        }
        buckets = [asdict(bucket) for bucket in self.positions]
        return {
            "perplexity": perplexity,
            "positions": [{"from": b.pop("start"), "to": b.pop("stop"), **b} for b in buckets],
        }


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
        on_event: gets a :class:`Progress` of stage ``evaluate`` after each batch.

    Raises:
        DataError: the text is shorter than one window.
        UsageError: the edges do not increase.
        ModelError: a loss is NaN or infinite; names the model and the window.
    """
    check_evaluation(tokens, window, positions)
    total = LossSums(window, with_base=base is not None)
    with torch.inference_mode(), _evaluating(model, base):
        for inputs, targets in _batches(tokens, window, windows, batch):
            total.add(_losses(model, base, inputs.to(model.device), targets.to(model.device)))
            on_event(Progress("evaluate", total.windows, f"ppl {total.perplexity():.4g}"))
    return total.evaluation(positions)


class LossSums:
    """Adds up the losses of windows by position; what every evaluation ends in.

    Args:
        window: inputs per window.
        with_base: losses of the base and the KL to it are given too.
    """

    def __init__(self, window: int, *, with_base: bool) -> None:
        names = ("model", "base", "kl") if with_base else ("model",)
        self.windows = 0
        self._sums = {name: torch.zeros(window, dtype=torch.float64) for name in names}
        self._counts = torch.zeros(window, dtype=torch.float64)

    def add(self, losses: dict[str, Tensor]) -> None:
        """Add windows of one length.

        Args:
            losses: of each predicted token, [b, t], for ``model``, ``base`` and ``kl``.

        Raises:
            ModelError: one is NaN or infinite; names the model and the window.
        """
        for name, loss in losses.items():
            _check_finite(loss, name, self.windows)
            self._sums[name][: loss.shape[1]] += loss.double().sum(0).cpu()
        count, length = losses["model"].shape
        self._counts[:length] += count
        self.windows += count

    def perplexity(self) -> float:
        """Return the model's perplexity so far."""
        return _perplexity(self._sums["model"], self._counts)

    def evaluation(self, positions: Sequence[int]) -> Evaluation:
        """Return the result, in buckets between these positions too."""
        sums, counts = self._sums, self._counts
        with_base = "base" in sums
        return Evaluation(
            perplexity=self.perplexity(),
            base_perplexity=_perplexity(sums["base"], counts) if with_base else None,
            kl=(sums["kl"].sum() / counts.sum()).item() if with_base else None,
            tokens=int(counts.sum()),
            window=len(counts),
            positions=tuple(_buckets(sums, counts, positions, with_base=with_base)),
        )


def check_evaluation(tokens: Tensor, window: int, positions: Sequence[int]) -> None:
    """Raise :class:`DataError` for a text shorter than a window, :class:`UsageError` for edges."""
    if len(tokens) <= window:
        raise DataError(
            f"the evaluation text is too short: {len(tokens):,} tokens, "
            f"{window + 1:,} are needed for one window of {window:,}",
            "give a longer text or a smaller --seq-len",
        )
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
    model: PreTrainedModel, base: PreTrainedModel | None, inputs: Tensor, targets: Tensor
) -> dict[str, Tensor]:
    """Return the losses of each predicted token, float32 [b, t], for the model, base and KL."""
    ours = _hidden(model, inputs)
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


def _hidden(model: PreTrainedModel, inputs: Tensor) -> Tensor:
    """Run the body once, through its cache if that is packed; returns [b * t, hidden]."""
    packed = bool(getattr(getattr(model, "config", None), "packed", False))
    output = model.base_model(input_ids=inputs, use_cache=packed)
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


def _check_finite(loss: Tensor, name: str, done: int) -> None:
    bad = ~torch.isfinite(loss).all(1)
    if bad.any():
        which = {"model": "the model", "base": "the base", "kl": "KL to the base"}[name]
        number = done + int(bad.nonzero()[0]) + 1
        raise ModelError(
            f"the loss of {which} is NaN or infinite in window {number}",
            "the weights are damaged, or the data type is too narrow: try --dtype float32",
        )


def _perplexity(sums: Tensor, counts: Tensor) -> float:
    return (sums.sum() / counts.sum()).exp().item()


def _buckets(
    sums: dict[str, Tensor], counts: Tensor, positions: Sequence[int], *, with_base: bool
) -> Iterator[Bucket]:
    """Yield the buckets that hold a token; the last one is cut at the window's end."""
    for start, edge in itertools.pairwise(positions):
        stop = min(edge, len(counts))
        if start < stop:
            part = slice(start, stop)
            base = _perplexity(sums["base"][part], counts[part]) if with_base else None
            yield Bucket(start, stop, base, _perplexity(sums["model"][part], counts[part]))
