"""Losses whose gradient is computed in the forward pass, against plain ones by autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from vdcompress.healing.divergence import Objective, Output, divergence

TOKENS, WIDTH, VOCABULARY = 23, 6, 37
OBJECTIVES = {
    "kl": Objective(1.0, 0.0),
    "ce": Objective(0.0, 1.0),
    "both": Objective(0.7, 0.4),
    "both, warm": Objective(0.7, 0.4, temperature=2.5),
    "kl, cold": Objective(1.3, 0.0, temperature=0.6),
}


def outputs(dtype: torch.dtype = torch.float64) -> tuple[Output, Output, Tensor]:
    """Return a student that learns everything, its teacher, and labels."""
    draw = torch.Generator().manual_seed(3)

    def one() -> Output:
        shapes = ((TOKENS, WIDTH), (VOCABULARY, WIDTH), (VOCABULARY,))
        return Output(*(torch.randn(shape, generator=draw, dtype=dtype) for shape in shapes))

    student, teacher = one(), one()
    for tensor in (student.hidden, student.weight, student.bias):
        assert tensor is not None
        tensor.requires_grad_()
    return student, teacher, torch.randint(VOCABULARY, (TOKENS,), generator=draw)


def tensors(output: Output) -> tuple[Tensor, Tensor, Tensor]:
    assert output.bias is not None
    return output.hidden, output.weight, output.bias


def plain(student: Output, teacher: Output | None, labels: Tensor, goal: Objective) -> Tensor:
    logits = student.hidden @ student.weight.T + student.bias
    total = goal.ce * torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    if teacher is not None:
        p = ((teacher.hidden @ teacher.weight.T + teacher.bias) / goal.temperature).softmax(-1)
        q = (logits / goal.temperature).softmax(-1)
        total = total + goal.kl * goal.temperature**2 * (p * (p.log() - q.log())).sum()
    return total


@pytest.mark.parametrize("chunk", [1, 5, 23, 100])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_loss_and_gradients_are_the_plain_ones(name: str, chunk: int) -> None:
    student, teacher, labels = outputs()
    goal = Objective(**{**vars(OBJECTIVES[name]), "chunk": chunk})

    total, cross_entropy = divergence(student, teacher, labels, goal)
    found = torch.autograd.grad(3.0 * total, tensors(student))

    expected = plain(student, teacher, labels, goal)
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=1e-12)
    wanted = torch.autograd.grad(3.0 * expected, tensors(student))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)
    alone = plain(student, None, labels, Objective(0.0, 1.0))
    torch.testing.assert_close(cross_entropy, alone.detach(), rtol=1e-12, atol=1e-12)
    assert not cross_entropy.requires_grad


def test_without_a_teacher_kl_is_left_out() -> None:
    student, _, labels = outputs()
    goal = Objective(5.0, 0.5, chunk=7)

    total, _ = divergence(student, None, labels, goal)

    torch.testing.assert_close(total, plain(student, None, labels, goal), rtol=1e-12, atol=1e-12)


def test_only_what_learns_gets_a_gradient() -> None:
    student, teacher, labels = outputs()
    hidden, weight, bias = (tensor.detach() for tensor in tensors(student))
    hidden.requires_grad_()

    total, _ = divergence(Output(hidden, weight, bias), teacher, labels, OBJECTIVES["kl"])
    total.backward()

    assert hidden.grad is not None
    assert weight.grad is None
    assert bias.grad is None


def test_in_bfloat16_it_is_close() -> None:
    student, teacher, labels = outputs(torch.float32)
    goal = Objective(1.0, 0.2, chunk=8)
    expected = plain(student, teacher, labels, goal)
    wanted = torch.autograd.grad(expected, tensors(student))

    with torch.autocast("cpu", torch.bfloat16):
        total, _ = divergence(student, teacher, labels, goal)
    found = torch.autograd.grad(total, tensors(student))

    assert total.dtype == torch.float32
    torch.testing.assert_close(total, expected, rtol=2e-2, atol=0)
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == torch.float32
        assert (one - other).norm() < 2e-2 * other.norm()


class Logits(TorchDispatchMode):
    """Notes how many rows of the vocabulary's width any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor) and value.dim() == 2 and value.shape[1] == VOCABULARY:
                self.most = max(self.most, value.shape[0])
        return result


def test_logits_exist_for_one_chunk_at_a_time() -> None:
    student, teacher, labels = outputs()

    with Logits() as seen:
        total, _ = divergence(student, teacher, labels, Objective(1.0, 1.0, chunk=4))
        total.backward()

    assert seen.most in range(4, WIDTH + 1)  # WIDTH: the transposed weight
