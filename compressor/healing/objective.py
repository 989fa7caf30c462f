"""What healing minimises, of a student beside its teacher on windows of tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vdcompress.healing.divergence import Objective, Output, divergence
from vdcompress.healing.hidden_states import hidden_state_error
from vdcompress.healing.layerwise import layerwise_error
from vdcompress.healing.top_k import TopKMasses

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_MEASURED = 1 / 8


@dataclass(frozen=True)
class Losses:
    """Sums over the predicted tokens: of the objective, with gradient, and of cross-entropy."""

    objective: Tensor
    cross_entropy: Tensor
    tokens: int


def losses(
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    windows: Tensor,
    objective: Objective,
    top: TopKMasses | None = None,
) -> Losses:
    """Run student and teacher on windows and compare their next-token distributions.

    Args:
        student: gets gradients.
        teacher: runs without gradients; None leaves KL out.
        windows: token ids [b, length]; each token predicts the next, b * (length - 1) of them.
        objective: weights, temperature and chunk size.
        top: the teacher's likeliest tokens for each of these; it then need not run.
    """
    if objective.layers and teacher is not None:
        return _layer_losses(student, teacher, windows, objective)
    inputs, labels = windows[:, :-1], windows[:, 1:].reshape(-1)
    hidden = bool(objective.hidden) and teacher is not None
    ours, our_states = _run(student, inputs, states=hidden)
    theirs: Output | None = None
    their_states: tuple[Tensor, ...] = ()
    if teacher is not None and (objective.kl or hidden):
        with torch.no_grad():
            theirs, their_states = _run(teacher, inputs, states=hidden)
    learns = torch.is_grad_enabled() and bool(objective.kl or objective.ce)
    with torch.set_grad_enabled(learns):
        total, cross_entropy = divergence(ours, top or theirs, labels, objective)
    if hidden:
        error = hidden_state_error(our_states, their_states)
        total = total + objective.hidden * len(labels) * error
    return Losses(total, cross_entropy, len(labels))


def _layer_losses(
    student: PreTrainedModel, teacher: PreTrainedModel, windows: Tensor, objective: Objective
) -> Losses:
    """Compare single layers; the student as a whole runs on a part of the windows only."""
    error = layerwise_error(student, teacher, windows[:, :-1])
    some = windows[: math.ceil(len(windows) * _MEASURED)]
    with torch.no_grad():
        measured = losses(student, None, some, replace(objective, kl=0.0, ce=1.0, layers=False))
    tokens = windows[:, 1:].numel()
    cross_entropy = measured.cross_entropy * (tokens / measured.tokens)
    return Losses(error * tokens, cross_entropy, tokens)


class Distilled(nn.Module):
    """A student beside its teacher: one module that maps windows to what is minimised.

    Wrappers such as DDP and FSDP see both in one. The teacher, if there is one, stays in
    evaluation mode and gets no gradients.

    Attributes:
        _no_split_modules: classes of the layers that FSDP gathers one by one, where accelerate
            looks for them.
    """

    _no_split_modules: list[str]

    def __init__(
        self, student: PreTrainedModel, teacher: PreTrainedModel | None, objective: Objective
    ) -> None:
        super().__init__()
        self.student = student
        self.teacher = None if teacher is None else teacher.requires_grad_(False)
        self.objective = objective

    def train(self, mode: bool = True) -> Distilled:
        """Set the student's mode."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def forward(
        self,
        input_ids: Tensor,
        measure: bool = False,
        top_ids: Tensor | None = None,
        top_logprobs: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Compare the next-token distributions on windows [b, length].

        Args:
            input_ids: each token predicts the next.
            measure: only the cross-entropy, without gradients.
            top_ids: the teacher's likeliest tokens [b, length - 1, k]; then it is not run.
            top_logprobs: their log-probabilities and the rest's, [b, length - 1, k + 1].

        Returns:
            ``loss``, the mean objective per predicted token, unless only measured;
            ``cross_entropy``, summed over them, in nats, without gradient; with
            ``objective.layers`` estimated from some of the windows while training;
            ``tokens``, how many there are.
        """
        teacher, objective, top = self.teacher, self.objective, None
        if measure:
            teacher, objective = None, replace(objective, kl=0.0, ce=1.0)
        elif top_ids is not None and top_logprobs is not None:
            top = TopKMasses(top_ids.flatten(0, 1), top_logprobs.flatten(0, 1))
        with torch.set_grad_enabled(torch.is_grad_enabled() and not measure):
            found = losses(self.student, teacher, input_ids, objective, top)
        tokens = torch.full((), found.tokens, device=input_ids.device)  # no copy from the host
        sums = {"cross_entropy": found.cross_entropy, "tokens": tokens}
        return sums if measure else {"loss": found.objective / found.tokens, **sums}


def _run(
    model: PreTrainedModel, inputs: Tensor, *, states: bool = False
) -> tuple[Output, tuple[Tensor, ...]]:
    """Return what makes logits, and where wanted the hidden states after each layer."""
    found = model.base_model(input_ids=inputs, use_cache=False, output_hidden_states=states)
    head: Any = model.get_output_embeddings()
    hidden: Tensor = found.last_hidden_state
    output = Output(hidden.flatten(0, 1), head.weight, getattr(head, "bias", None))
    return output, found.hidden_states[1:] if states else ()


def cross_entropy(
    model: PreTrainedModel, windows: Tensor, *, batch: int, chunk: int, bf16: bool = False
) -> float:
    """Return the mean cross-entropy per predicted token, in nats.

    Args:
        model: put into evaluation mode.
        windows: token ids [m, length], on any device.
        batch: windows per forward pass.
        chunk: tokens whose logits exist at one time.
        bf16: compute in bfloat16.
    """
    model.eval()
    objective = Objective(kl=0.0, ce=1.0, chunk=chunk)
    total = torch.zeros((), dtype=torch.float64, device=model.device)
    tokens = 0
    with torch.no_grad(), torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
        for part in windows.split(batch):
            found = losses(model, None, part.to(model.device), objective)
            total += found.cross_entropy
            tokens += found.tokens
    return total.item() / tokens
