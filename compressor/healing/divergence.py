"""Cross-entropy and KL divergence from hidden states, so that few logits exist at one time.

A vocabulary is wide: the logits of a batch would outweigh everything else in memory. Here the
output embedding is applied to a chunk of tokens at a time and the gradient of the loss with
respect to the hidden states is computed right then, so backward needs no logits: with
``p = softmax(s)``, ``q = softmax(t)`` the gradient of ``kl KL(q || p) + ce CE`` with respect to the
student's logits ``s`` is ``kl (p - q) + ce (p - onehot(label))``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from vdcompress.healing import fused_rows
from vdcompress.healing.top_k import TopKMasses, top_k_losses


@dataclass(frozen=True)
class Objective:
    """What is minimised: ``kl`` KL(teacher || student) + ``ce`` cross-entropy, per token.

    Where ``hidden`` is not 0 the error of the hidden states is added; with ``layers`` the error of
    single layers is all that is minimised.

    Attributes:
        kl: weight; the divergence is taken at ``temperature`` and multiplied by its square.
        ce: weight.
        temperature: divides both logits in KL.
        chunk: tokens whose logits exist at one time.
        hidden: weight of :func:`~vdcompress.healing.hidden_states.hidden_state_error`.
        layers: minimise :func:`~vdcompress.healing.layerwise.layerwise_error` instead.
    """

    kl: float
    ce: float
    temperature: float = 1.0
    chunk: int = 1024
    hidden: float = 0.0
    layers: bool = False


@dataclass(frozen=True)
class Output:
    """Hidden states [n, hidden] and what makes logits of them.

    Attributes:
        hidden: of n tokens.
        weight: [vocabulary, hidden].
        bias: [vocabulary], or None.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None

    def logits(self, part: slice, dtype: torch.dtype) -> Tensor:
        """Return the logits of some tokens."""
        bias = None if self.bias is None else self.bias.to(dtype)
        return functional.linear(self.hidden[part].to(dtype), self.weight, bias)

    def detached(self, dtype: torch.dtype) -> Output:
        """Return the same outside of any graph, with the weight in ``dtype``."""
        bias = None if self.bias is None else self.bias.detach()
        return Output(self.hidden.detach(), self.weight.detach().to(dtype), bias)


Teacher = Output | TopKMasses


def divergence(
    student: Output, teacher: Teacher | None, labels: Tensor, objective: Objective
) -> tuple[Tensor, Tensor]:
    """Return the summed objective, with gradient, and the summed cross-entropy, without.

    Args:
        student: its hidden states, weight and bias get gradients where they require them.
        teacher: gets none; None leaves KL out, masses of its likeliest tokens are compared as
            ``top_k.py`` says.
        labels: next tokens, int64 [n].
        objective: weights, temperature and chunk size.
    """
    total, cross_entropy = _Divergence.apply(  # type: ignore[no-untyped-call]
        student.hidden, student.weight, student.bias, teacher, labels, objective
    )
    return total, cross_entropy


class _Divergence(torch.autograd.Function):
    """Computes the gradient in the forward pass and scales it in the backward pass."""

    @staticmethod
    def forward(  # noqa: PLR0917 - autograd passes them so
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        teacher: Teacher | None,
        labels: Tensor,
        objective: Objective,
    ) -> tuple[Tensor, Tensor]:
        dtype = _matmul_dtype(hidden)
        student = Output(hidden, weight, bias).detached(dtype)
        if not objective.kl:
            teacher = None
        elif isinstance(teacher, Output):
            teacher = teacher.detached(dtype)
        wanted = [bool(needed) for needed in ctx.needs_input_grad[:3]]
        gradients = _Gradients(student, wanted)
        sums = []
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(labels), objective.chunk):
                part = slice(start, start + objective.chunk)
                logits = student.logits(part, dtype)
                target = _target(teacher, part, dtype)
                sums.append(_losses(logits, target, labels[part], objective, gradient=any(wanted)))
                gradients.add(part, logits)
        ctx.save_for_backward(*gradients.found)
        total, cross_entropy = torch.stack(sums).sum(0)
        ctx.mark_non_differentiable(cross_entropy)
        return total, cross_entropy

    @staticmethod
    def backward(ctx: Any, scale: Tensor, _: Tensor) -> Any:
        found = [None if g is None else g * scale.to(g.dtype) for g in ctx.saved_tensors]
        return (*found, None, None, None)


class _Gradients:
    """The gradients of the student's hidden states, weight and bias, filled chunk by chunk."""

    def __init__(self, student: Output, wanted: list[bool]) -> None:
        self._student = student
        tensors = (student.hidden, student.weight, student.bias)
        kinds = (student.hidden.dtype, _wide(student.weight.dtype), _wide(student.weight.dtype))
        self.found = [
            torch.zeros_like(tensor, dtype=kind) if needed and tensor is not None else None
            for tensor, kind, needed in zip(tensors, kinds, wanted, strict=True)
        ]

    def add(self, part: slice, logits: Tensor) -> None:
        """Add a chunk; ``logits`` holds the gradient with respect to its logits."""
        hidden, weight, bias = self.found
        if hidden is not None:
            hidden[part] = logits @ self._student.weight
        if weight is not None:
            weight += logits.T @ self._student.hidden[part].to(logits.dtype)
        if bias is not None:
            bias += logits.sum(0)


def _target(teacher: Teacher | None, part: slice, dtype: torch.dtype) -> Tensor | TopKMasses | None:
    """Return what the student's logits of some tokens are compared with."""
    if isinstance(teacher, TopKMasses):
        return teacher.part(part)
    return None if teacher is None else teacher.logits(part, dtype)


def _losses(
    logits: Tensor,
    teacher: Tensor | TopKMasses | None,
    labels: Tensor,
    objective: Objective,
    *,
    gradient: bool,
) -> Tensor:
    """Return the summed objective and cross-entropy [2]; ``logits`` becomes their gradient."""
    if isinstance(teacher, TopKMasses):
        return top_k_losses(logits, teacher, labels, objective, gradient=gradient)
    if logits.is_cuda and fused_rows.AVAILABLE and objective.temperature == 1.0 and _narrow(logits):
        kl = 0.0 if teacher is None else objective.kl
        rows = fused_rows.fused_rows(
            logits, teacher, labels, kl=kl, ce=objective.ce, gradient=gradient
        )
        return torch.stack([row.sum() for row in rows])
    return _plain_losses(logits, teacher, labels, objective, gradient=gradient)


def _plain_losses(
    logits: Tensor, teacher: Tensor | None, labels: Tensor, objective: Objective, *, gradient: bool
) -> Tensor:
    log_p = logits.to(_wide(logits.dtype)).log_softmax(-1)
    cross_entropy = -log_p.gather(-1, labels[:, None]).sum()
    total = objective.ce * cross_entropy
    slope = torch.zeros_like(log_p) if gradient else None
    if gradient and objective.ce:
        slope = log_p.exp().mul_(objective.ce)
        slope.scatter_add_(-1, labels[:, None], slope.new_full((len(labels), 1), -objective.ce))
    if teacher is not None:
        t = objective.temperature
        log_q = (teacher.to(log_p.dtype) / t).log_softmax(-1)
        if t != 1.0:
            log_p = (logits.to(log_p.dtype) / t).log_softmax(-1)
        q = log_q.exp()
        total = total + objective.kl * t**2 * torch.linalg.vecdot(q, log_q - log_p).sum()
        if slope is not None:
            slope += (log_p.exp() - q).mul_(objective.kl * t)
    if slope is not None:
        logits.copy_(slope)
    return torch.stack([total, cross_entropy])


def _matmul_dtype(hidden: Tensor) -> torch.dtype:
    """Return the dtype that autocast would give a matrix product here."""
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


def _wide(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.float32


def _narrow(logits: Tensor) -> bool:
    return logits.dtype != torch.float64
