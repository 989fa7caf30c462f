"""Losses of healing, computed so that the logits of all tokens never exist at once.

A vocabulary is wide: the logits of a batch would outweigh everything else in memory. So the bodies
of student and teacher give hidden states, and the output embedding is applied to a chunk of tokens
at a time; with more than one chunk, backward computes each chunk's logits again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Objective:
    """What is minimised: ``kl`` KL(teacher || student) + ``ce`` cross-entropy, per token."""

    kl: float
    ce: float
    temperature: float = 1.0
    chunk: int = 1024


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
    ours = _hidden(student, inputs)
    theirs = None
    if teacher is not None and objective.kl:
        with torch.no_grad():
            theirs = _hidden(teacher, inputs)
    head = student.get_output_embeddings()
    teacher_head = None if teacher is None else teacher.get_output_embeddings()
    again = len(labels) > objective.chunk and torch.is_grad_enabled()
    sums = []
    for start in range(0, len(labels), objective.chunk):
        part = slice(start, start + objective.chunk)
        chunk = _Chunk(
            labels[part], objective, head, teacher_head, None if theirs is None else theirs[part]
        )
        sums.append(_recomputed(chunk, ours[part]) if again else chunk.sums(ours[part]))
    total = torch.stack([one for one, _ in sums]).sum()
    return Losses(total, torch.stack([ce for _, ce in sums]).sum(), len(labels))


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


def _hidden(model: PreTrainedModel, inputs: Tensor) -> Tensor:
    hidden: Tensor = model.base_model(input_ids=inputs, use_cache=False).last_hidden_state
    return hidden.flatten(0, 1)


@dataclass(frozen=True)
class _Chunk:
    """Some tokens' labels, and the teacher's hidden states [n, hidden] of them."""

    labels: Tensor
    objective: Objective
    head: nn.Module
    teacher_head: nn.Module | None
    teacher_hidden: Tensor | None

    def sums(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return the summed objective, with gradient, and the cross-entropy, without.

        Args:
            hidden: the student's states [n, hidden].
        """
        logits = _wide(self.head(hidden))
        label_logits = logits.gather(-1, self.labels[:, None])[:, 0]
        cross_entropy = (logits.logsumexp(-1) - label_logits).sum()
        total = self.objective.ce * cross_entropy
        if self.teacher_head is not None and self.teacher_hidden is not None:
            with torch.no_grad():
                teacher = _wide(self.teacher_head(self.teacher_hidden))
            divergence = _kl(teacher, logits, self.objective.temperature)
            total = self.objective.kl * divergence
            if self.objective.ce:
                total = total + self.objective.ce * cross_entropy
        return total, cross_entropy.detach()


def _recomputed(chunk: _Chunk, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Forget the chunk's logits; backward computes them again."""
    sums: tuple[Tensor, Tensor] = checkpoint(
        chunk.sums, hidden, use_reentrant=False, preserve_rng_state=False
    )
    return sums


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _kl(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    """Return temperature^2 times the sum over rows of KL(teacher || student), logits [n, v]."""
    if temperature != 1.0:
        teacher, student = teacher / temperature, student / temperature
    log_p = teacher.log_softmax(-1)
    p = log_p.exp()
    negative_entropy = torch.linalg.vecdot(p, log_p)
    cross = student.logsumexp(-1) - torch.linalg.vecdot(p, student)
    divergence: Tensor = (cross + negative_entropy).sum()
    return temperature**2 * divergence


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
