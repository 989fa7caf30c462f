"""One CUDA kernel for the losses of rows of logits and their gradient, written over the logits.

Each row is read twice: once for the two normalisers (online log-sum-exp, Milakov and Gimelshein,
arXiv:1805.02867), once for the losses and the gradient. Nothing of the vocabulary's width is
allocated.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

AVAILABLE = find_spec("triton") is not None
_BLOCK = 4096
_WARPS = 8

if AVAILABLE:
    import triton
    import triton.language as tl

    @triton.jit  # type: ignore[untyped-decorator, unused-ignore]
    def _kernel(  # type: ignore[no-untyped-def]  # noqa: PLR0917
        student,
        teacher,
        labels,
        objective,
        cross_entropy,
        vocabulary,
        kl,
        ce,
        HAS_TEACHER: tl.constexpr,
        GRADIENT: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        student += row * vocabulary
        teacher += row * vocabulary
        s_most = -float("inf")
        s_sum = 0.0
        t_most = -float("inf")
        t_sum = 0.0
        for start in range(0, vocabulary, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            inside = columns < vocabulary
            s = tl.load(student + columns, mask=inside, other=-float("inf")).to(tl.float32)
            most = tl.maximum(s_most, tl.max(s, 0))
            s_sum = s_sum * tl.exp(s_most - most) + tl.sum(tl.exp(s - most), 0)
            s_most = most
            if HAS_TEACHER:
                t = tl.load(teacher + columns, mask=inside, other=-float("inf")).to(tl.float32)
                most = tl.maximum(t_most, tl.max(t, 0))
                t_sum = t_sum * tl.exp(t_most - most) + tl.sum(tl.exp(t - most), 0)
                t_most = most
        s_norm = s_most + tl.log(s_sum)
        t_norm = 0.0
        if HAS_TEACHER:
            t_norm = t_most + tl.log(t_sum)
        label = tl.load(labels + row)
        own = s_norm - tl.load(student + label).to(tl.float32)
        divergence = 0.0
        if HAS_TEACHER or GRADIENT:
            for start in range(0, vocabulary, BLOCK):
                columns = start + tl.arange(0, BLOCK)
                inside = columns < vocabulary
                s = tl.load(student + columns, mask=inside, other=0.0).to(tl.float32) - s_norm
                gradient = (kl + ce) * tl.exp(s) - tl.where(columns == label, ce, 0.0)
                if HAS_TEACHER:
                    t = tl.load(teacher + columns, mask=inside, other=0.0).to(tl.float32) - t_norm
                    p = tl.exp(t)
                    divergence += tl.sum(tl.where(inside, p * (t - s), 0.0), 0)
                    gradient -= kl * p
                if GRADIENT:
                    tl.store(student + columns, gradient, mask=inside)
        tl.store(objective + row, kl * divergence + ce * own)
        tl.store(cross_entropy + row, own)


def fused_rows(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor,
    *,
    kl: float,
    ce: float,
    gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Return the objective and the cross-entropy of each row, float32 [n].

    Args:
        student: logits [n, vocabulary] on CUDA, contiguous; with ``gradient`` they are replaced by
            the objective's gradient with respect to them.
        teacher: logits of the same shape, contiguous; None leaves KL out.
        labels: the next token of each row, int64 [n].
        kl: weight of KL(teacher || student).
        ce: weight of the cross-entropy.
        gradient: whether the gradient is wanted.
    """
    rows, vocabulary = student.shape
    objective = torch.empty(rows, dtype=torch.float32, device=student.device)
    cross_entropy = torch.empty_like(objective)
    _kernel[(rows,)](
        student,
        student if teacher is None else teacher,
        labels,
        objective,
        cross_entropy,
        vocabulary,
        0.0 if teacher is None else kl,
        ce,
        HAS_TEACHER=teacher is not None,
        GRADIENT=gradient,
        BLOCK=_BLOCK,
        num_warps=_WARPS,
    )
    return objective, cross_entropy
