"""Top-k distillation: the divergence against a naive one, and the teacher's cache on disk."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from vdcompress.healing.divergence import Objective, Output, divergence
from vdcompress.healing.top_k import TopKMasses

ROWS, WIDTH, VOCABULARY = 13, 6, 17


def goal_of(
    kl: float = 1.0, ce: float = 0.0, temperature: float = 1.0, chunk: int = 50
) -> Objective:
    return Objective(kl, ce, temperature, chunk)


def losses(
    hidden: Tensor, head: nn.Linear, labels: Tensor, top: tuple[Tensor, Tensor], goal: Objective
) -> tuple[Tensor, Tensor]:
    return divergence(Output(hidden, head.weight, head.bias), TopKMasses(*top), labels, goal)


def states(seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(ROWS, WIDTH, generator=draw, dtype=torch.float64)


def a_head(seed: int, scale: float = 2.0, bias: bool = True) -> nn.Linear:
    torch.manual_seed(seed)
    head = nn.Linear(WIDTH, VOCABULARY, bias=bias).double()
    with torch.no_grad():
        head.weight.mul_(scale)
    return head


def kept(logits: Tensor, k: int, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return a teacher's likeliest tokens, their log-probabilities and the tail's."""
    p = (logits / temperature).softmax(-1)
    top, ids = p.topk(k)
    inside = torch.zeros_like(p, dtype=torch.bool).scatter(-1, ids, True)
    tail = p.masked_fill(inside, 0.0).sum(-1, keepdim=True)
    return ids, torch.cat((top, tail), -1).log().detach()


def naive(logits: Tensor, teacher: Tensor, labels: Tensor, k: int, goal: Objective) -> Tensor:
    """Sum both softmaxes into the same buckets, one row and one token at a time."""
    p, q = (teacher / goal.temperature).softmax(-1), (logits / goal.temperature).softmax(-1)
    total = logits.new_zeros(())
    for row in range(len(p)):
        top = p[row].argsort(descending=True)[:k].tolist()
        rest = [token for token in range(p.shape[1]) if token not in top]
        for bucket in [[token] for token in top] + ([rest] if rest else []):
            ours, theirs = q[row, bucket].sum(), p[row, bucket].sum()
            total = total + goal.kl * goal.temperature**2 * theirs * (theirs / ours).log()
        total = total - goal.ce * logits[row].log_softmax(-1)[labels[row]]
    return total


@pytest.fixture
def labels() -> Tensor:
    return torch.randint(VOCABULARY, (ROWS,), generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("chunk", [1, 5, 13, 100])
@pytest.mark.parametrize(
    ("k", "goal"),
    [
        (1, goal_of()),
        (4, goal_of(kl=0.7, ce=0.4)),
        (4, goal_of(kl=1.5, ce=0.3, temperature=2.0)),
        (VOCABULARY - 1, goal_of()),
        (VOCABULARY, goal_of(ce=0.1)),
    ],
)
def test_the_divergence_and_its_gradients_agree_with_a_naive_one(
    k: int, goal: Objective, chunk: int, labels: Tensor
) -> None:
    head, hidden = a_head(1), states(2).requires_grad_()
    teacher = a_head(8)(states(3)).detach()
    plain = naive(head(hidden), teacher, labels, k, goal)
    expected = torch.autograd.grad(plain, [hidden, head.weight, head.bias])

    goal = goal_of(goal.kl, goal.ce, goal.temperature, chunk)
    ids, logprobs = kept(teacher, k, goal.temperature)
    found, cross_entropy = losses(hidden, head, labels, (ids, logprobs), goal)
    gradients = torch.autograd.grad(3 * found, [hidden, head.weight, head.bias])

    assert found.item() == pytest.approx(plain.item(), rel=1e-12)
    for gradient, known in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, 3 * known, rtol=1e-10, atol=1e-12)
    known_ce = nn.functional.cross_entropy(head(hidden), labels, reduction="sum")
    assert cross_entropy.item() == pytest.approx(known_ce.item(), rel=1e-12)
    assert not cross_entropy.requires_grad


@pytest.mark.parametrize("k", [3, VOCABULARY])
def test_gradcheck(k: int, labels: Tensor) -> None:
    head, hidden = a_head(1), states(2).requires_grad_()
    ids, logprobs = kept(a_head(8)(states(3)), k, 1.5)
    goal = goal_of(0.8, 0.3, 1.5, chunk=4)

    def objective(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return losses(hidden, head, labels, (ids, logprobs), goal)[0]

    assert torch.autograd.gradcheck(objective, (hidden, head.weight, head.bias))


def test_it_is_the_full_divergence_at_full_k_and_grows_with_k(labels: Tensor) -> None:
    head, hidden = a_head(1), states(2)
    teacher = a_head(8)(states(3)).detach()
    p, q = teacher.log_softmax(-1), head(hidden).log_softmax(-1)
    full = nn.functional.kl_div(q, p, log_target=True, reduction="sum").item()

    found = [
        losses(hidden, head, labels, kept(teacher, k), goal_of())[0].item()
        for k in (1, 2, 4, 8, VOCABULARY)
    ]

    assert 0 < found[0] < found[1] < found[2] < found[3] < full
    assert found[-1] == pytest.approx(full, rel=1e-12)


def test_a_student_that_agrees_has_no_loss_and_no_gradient(labels: Tensor) -> None:
    head, hidden = a_head(1), states(2).requires_grad_()
    ids, logprobs = kept(head(hidden), 5)

    found, _ = losses(hidden, head, labels, (ids, logprobs), goal_of())
    (gradient,) = torch.autograd.grad(found, hidden)

    assert abs(found.item()) < 1e-12
    assert gradient.abs().max() < 1e-12


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_rounded_masses_are_a_distribution_again(dtype: torch.dtype, labels: Tensor) -> None:
    head, hidden = a_head(1), states(2)
    ids, logprobs = kept(head(hidden), 5)

    found, _ = losses(hidden, head, labels, (ids, logprobs.to(dtype)), goal_of())

    assert 0 <= found.item() / ROWS < 1e-6


@pytest.mark.parametrize("scale", [200.0, 20000.0])
def test_vanishing_tails_give_finite_gradients(scale: float, labels: Tensor) -> None:
    head, hidden = a_head(1, scale).float(), states(2).float().requires_grad_()
    ids, logprobs = kept(a_head(8, scale)(states(3)), 2)
    assert logprobs[:, -1].min() < -100

    found, _ = losses(hidden, head, labels, (ids, logprobs.half()), goal_of(chunk=4))
    (gradient,) = torch.autograd.grad(found, hidden)

    assert torch.isfinite(found)
    assert torch.isfinite(gradient).all()
    assert gradient.abs().max() > 1


def test_a_frozen_head_and_no_gradients_at_all(labels: Tensor) -> None:
    head, hidden = a_head(1).requires_grad_(False), states(2).requires_grad_()
    ids, logprobs = kept(a_head(8)(states(3)), 4)

    found, _ = losses(hidden, head, labels, (ids, logprobs), goal_of())
    found.backward()
    with torch.no_grad():
        still, _ = losses(hidden, head, labels, (ids, logprobs), goal_of())

    assert hidden.grad is not None
    assert head.weight.grad is None
    assert not still.requires_grad
    assert still.item() == found.item()


def test_a_head_that_learns_below_frozen_states(labels: Tensor) -> None:
    head, hidden = a_head(1), states(2)
    ids, logprobs = kept(a_head(8)(states(3)), 4)

    found, _ = losses(hidden, head, labels, (ids, logprobs), goal_of(chunk=4))
    found.backward()
    plain = naive(head(hidden), a_head(8)(states(3)), labels, 4, goal_of())
    (known,) = torch.autograd.grad(plain, head.weight)

    torch.testing.assert_close(head.weight.grad, known)


def test_bfloat16_autocast_is_close(labels: Tensor) -> None:
    head, hidden = a_head(1).float(), states(2).float().requires_grad_()
    ids, logprobs = kept(a_head(8)(states(3)), 4)
    goal = goal_of(ce=0.5, chunk=4)
    exact, _ = losses(hidden, head, labels, (ids, logprobs), goal)
    expected = torch.autograd.grad(exact, [hidden, head.weight])

    with torch.autocast("cpu", torch.bfloat16):
        found, _ = losses(hidden, head, labels, (ids, logprobs), goal)
    gradients = torch.autograd.grad(found, [hidden, head.weight])

    assert found.item() == pytest.approx(exact.item(), rel=0.02)
    for gradient, known in zip(gradients, expected, strict=True):
        assert gradient.dtype == torch.float32
        assert (gradient - known).norm() < 0.03 * known.norm()
