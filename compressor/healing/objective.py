"""What healing minimises, of a student beside its teacher on windows of tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vdcompress.healing.divergence import Objective, Output, divergence

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
) -> Losses:
    """Run student and teacher on windows and compare their next-token distributions.

    Args:
        student: gets gradients.
        teacher: runs without gradients; None leaves KL out.
        windows: token ids [b, length]; each token predicts the next, b * (length - 1) of them.
        objective: weights, temperature and chunk size.
    """
    inputs, labels = windows[:, :-1], windows[:, 1:].reshape(-1)
    ours = _output(student, inputs)
    theirs = None
    if teacher is not None and objective.kl:
        with torch.no_grad():
            theirs = _output(teacher, inputs)
    return Losses(*divergence(ours, theirs, labels, objective), len(labels))


class Distilled(nn.Module):
    """A student beside its teacher: one module that maps windows to what is minimised.

    Wrappers such as DDP and FSDP see both in one. The teacher, if there is one, stays in
    evaluation mode and gets no gradients.
    """

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

    def forward(self, input_ids: Tensor, measure: bool = False) -> dict[str, Tensor]:
        """Compare the next-token distributions on windows [b, length].

        Args:
            input_ids: each token predicts the next.
            measure: only the cross-entropy, without gradients.

        Returns:
            ``loss``, the mean objective per predicted token, unless only measured;
            ``cross_entropy``, summed over them, in nats, without gradient;
            ``tokens``, how many there are.
        """
        teacher, objective = self.teacher, self.objective
        if measure:
            teacher, objective = None, replace(objective, kl=0.0, ce=1.0)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not measure):
            found = losses(self.student, teacher, input_ids, objective)
        tokens = torch.tensor(found.tokens, device=input_ids.device)
        sums = {"cross_entropy": found.cross_entropy, "tokens": tokens}
        return sums if measure else {"loss": found.objective / found.tokens, **sums}


def _output(model: PreTrainedModel, inputs: Tensor) -> Output:
    hidden: Tensor = model.base_model(input_ids=inputs, use_cache=False).last_hidden_state
    head: Any = model.get_output_embeddings()
    return Output(hidden.flatten(0, 1), head.weight, getattr(head, "bias", None))


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
