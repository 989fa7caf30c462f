"""Measure a compressed model beside its base, both larger than memory (protocol: evaluate.py).

Both run layer by layer from their folders; then the output embeddings are read a block of the
vocabulary at a time, and logits exist for one block and a few tokens only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from vdcompress.evaluate import POSITIONS, Evaluation, LossSums, check_evaluation
from vdcompress.events import OnEvent, Progress, ignore
from vdcompress.layerwise import HiddenStates, Stack

VOCABULARY_BLOCK = 4096
TOKENS = 2048


def evaluate_stacks(
    model: Stack,
    base: Stack,
    tokens: Tensor,
    *,
    window: int = 2048,
    windows: int = 24,
    positions: Sequence[int] = POSITIONS,
    folder: Path | None = None,
    on_event: OnEvent = ignore,
) -> Evaluation:
    """Measure a model and its base as :func:`~vdcompress.evaluate.evaluate` does.

    Memory: one layer, one window, a block of :data:`VOCABULARY_BLOCK` output embeddings
    of each model and their logits for :data:`TOKENS` tokens; and the hidden states of both models.

    Args:
        model: the compressed model.
        base: the model before compression, with the same vocabulary.
        tokens: the text, int64, shape [n].
        window: inputs per window.
        windows: most windows to use.
        positions: edges of the buckets in which perplexity is also given, increasing.
        folder: keep the hidden states in temporary files there; None keeps them in memory.
        on_event: gets a :class:`Progress` of stage ``evaluate`` after each layer.

    Raises:
        DataError: the text is shorter than one window.
        UsageError: the edges do not increase.
        ModelError: a loss is NaN or infinite, or weights cannot be read.
    """
    check_evaluation(tokens, window, positions)
    inputs, targets = _windows(tokens, window, windows)
    count, length = inputs.shape
    with (
        HiddenStates(count, length, model.width, folder) as ours,
        HiddenStates(count, length, base.width, folder) as theirs,
    ):
        for done in _finish(base, inputs, theirs):
            on_event(Progress("evaluate", done))
        for done in _finish(model, inputs, ours):
            on_event(Progress("evaluate", len(base) + done))
        with torch.inference_mode():
            losses = head_losses(model, base, ours, theirs, targets)
    total = LossSums(window, with_base=True)
    for row, label in enumerate(targets):
        length = int((label >= 0).sum())
        total.add({name: loss[row : row + 1, :length] for name, loss in losses.items()})
    return total.evaluation(positions)


def _windows(tokens: Tensor, window: int, windows: int) -> tuple[Tensor, Tensor]:
    """Return inputs and targets [n, window]; a shorter last one has targets -1 at its end."""
    used = tokens[: windows * window + 1]
    count = -(-(len(used) - 1) // window)
    inputs = used.new_zeros(count * window)
    targets = used.new_full((count * window,), -1)
    inputs[: len(used) - 1], targets[: len(used) - 1] = used[:-1], used[1:]
    return inputs.view(count, window), targets.view(count, window)


def _finish(stack: Stack, inputs: Tensor, hidden: HiddenStates) -> Iterator[int]:
    """Make ``hidden`` what the output embeddings read; yields the layers that are done."""
    stack.embed(inputs, hidden)
    for index in range(len(stack)):
        with stack.layer(index):
            for _ in stack.run(hidden):
                pass
        yield index + 1
    stack.finish(hidden)


def head_losses(
    model: Stack, base: Stack, ours: HiddenStates, theirs: HiddenStates, targets: Tensor
) -> dict[str, Tensor]:
    """Return cross-entropies and KL(base || model) of each token, float64 [n, t].

    One pass over the vocabulary: log-sum-exp and the expectation of the logits' difference under
    the base are carried from block to block.

    Args:
        model: the compressed model.
        base: its base.
        ours: the final hidden states of the model.
        theirs: those of the base.
        targets: tokens [n, t], -1 where there is none (such a loss is of no meaning).
    """
    q, p = _Norm(targets), _Norm(targets)
    difference = torch.zeros(targets.shape, dtype=torch.float64)
    batch = max(1, TOKENS // targets.shape[1])
    for start, q_rows, p_rows in _head_blocks(model, base):
        for first in range(0, len(targets), batch):
            part = slice(first, first + batch)
            q_logits = _logits(ours, part, q_rows)
            p_logits = _logits(theirs, part, p_rows)
            before = p.norm[part].clone()
            q.add(part, q_logits, start)
            within = p.add(part, p_logits, start)
            here = _expected_difference(p_logits, q_logits)
            now = p.norm[part]
            kept = difference[part] * (before - now).exp()
            difference[part] = kept + here * (within - now).exp()
    return {"model": q.loss(), "base": p.loss(), "kl": difference - p.norm + q.norm}


def _logits(hidden: HiddenStates, part: slice, rows: Tensor) -> Tensor:
    """Return logits [b, t, block] on the device of the output embeddings ``rows``."""
    return functional.linear(hidden.read(part.start, part.stop).to(rows.device), rows)


def _expected_difference(p: Tensor, q: Tensor) -> Tensor:
    """Return E[p - q] under softmax(p) within one block, float64 [b, t]; both are overwritten."""
    q.neg_().add_(p)
    p.sub_(p.logsumexp(-1, keepdim=True)).exp_()
    return torch.linalg.vecdot(p, q).cpu().double()


def _head_blocks(model: Stack, base: Stack) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield blocks of both models' output embeddings, float32 [rows, hidden], and their start."""
    ours = model.head_blocks(VOCABULARY_BLOCK)
    theirs = base.head_blocks(VOCABULARY_BLOCK)
    for (start, q_rows), (_start, p_rows) in zip(ours, theirs, strict=True):
        yield start, q_rows, p_rows


class _Norm:
    """The log-sum-exp of logits so far, and the logit of each target.

    Args:
        targets: [n, t].
    """

    def __init__(self, targets: Tensor) -> None:
        self._targets = targets
        self.norm = torch.full(targets.shape, -torch.inf, dtype=torch.float64)
        self._target = torch.zeros(targets.shape, dtype=torch.float64)

    def add(self, part: slice, logits: Tensor, start: int) -> Tensor:
        """Add the logits [b, t, block] of some windows; returns their own log-sum-exp [b, t]."""
        within = logits.logsumexp(-1).cpu().double()
        self.norm[part] = torch.logaddexp(self.norm[part], within)
        places = self._targets[part] - start
        inside = (places >= 0) & (places < logits.shape[-1])
        found = logits.gather(-1, (places * inside)[..., None].to(logits.device))[..., 0]
        self._target[part] = torch.where(inside, found.cpu().double(), self._target[part])
        return within

    def loss(self) -> Tensor:
        """Return the cross-entropies [n, t]."""
        return self.norm - self._target
