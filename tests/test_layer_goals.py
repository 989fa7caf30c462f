"""Goals within the model: hidden states and single layers, against plain loops."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from vdcompress.healing.divergence import Objective
from vdcompress.healing.hidden_states import hidden_state_error, relative_error
from vdcompress.healing.layerwise import decoder_layers, layer_targets, layerwise_error
from vdcompress.healing.objective import Distilled, losses
from vdcompress.load import Base
from vdcompress.plan import make_plan
from vdcompress.rewrite import rewrite
from vdcompress.statistics import Statistics


@pytest.fixture(scope="module")
def student(base: Base, statistics: Statistics) -> Any:
    """Return a compressed model of half the width, in float64."""
    plan = make_plan(base.shape, v_dim=8 * base.shape.kv_heads)
    return copy.deepcopy(rewrite(base, plan, statistics)).double().eval()


@pytest.fixture(scope="module")
def teacher(base: Base) -> Any:
    return copy.deepcopy(base.model).double().eval().requires_grad_(False)


@pytest.fixture
def inputs(token_windows: Tensor) -> Tensor:
    return token_windows[:3, :20]


def naive(found: Tensor, wanted: Tensor, reference: Tensor) -> Tensor:
    windows = []
    for ours, theirs, theirs_alone in zip(found, wanted, reference, strict=True):
        from_mean = theirs_alone - theirs_alone.mean(0, keepdim=True)
        windows.append((ours - theirs).square().sum() / from_mean.square().sum())
    return torch.stack(windows).mean()


def gradients(loss: Tensor, model: Any) -> dict[str, Tensor | None]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
    return dict(zip(names, found, strict=True))


def states_error(student: Any, teacher: Any, inputs: Tensor) -> Tensor:
    ours, theirs = (
        model.base_model(inputs, output_hidden_states=True, use_cache=False).hidden_states
        for model in (student, teacher)
    )
    return hidden_state_error(ours[1:], theirs[1:])


def alone(model: Any, layer: Any, state: Tensor) -> Tensor:
    """Run one layer as the model's own forward does, by the arguments that it gets there."""
    caught: list[Any] = []
    hook = layer.register_forward_pre_hook(
        lambda _, args, kwargs: caught.append(kwargs), with_kwargs=True
    )
    model(torch.zeros(state.shape[:2], dtype=torch.long), use_cache=False)
    hook.remove()
    output = layer(state, **caught[0])
    return output[0] if isinstance(output, tuple) else output


def test_every_layer_against_a_plain_loop(student: Any, teacher: Any, inputs: Tensor) -> None:
    states = teacher.base_model(inputs, output_hidden_states=True, use_cache=False).hidden_states
    expected = []
    x = states[0]
    for ours, theirs in zip(decoder_layers(student), decoder_layers(teacher), strict=True):
        y = alone(teacher, theirs, x)
        expected.append(naive(alone(student, ours, x), y, y - x))
        x = y
    plain = torch.stack(expected).mean()

    found = layerwise_error(student, teacher, inputs)

    assert found.item() > 1e-4
    assert found.item() == pytest.approx(plain.item(), rel=1e-10)
    known = gradients(plain, student)
    for name, gradient in gradients(found, student).items():
        if gradient is None:
            assert known[name] is None
        else:
            torch.testing.assert_close(gradient, known[name], rtol=1e-9, atol=1e-12)


def test_targets_are_the_layers_inputs_and_outputs(teacher: Any, inputs: Tensor) -> None:
    states = teacher.base_model(inputs, output_hidden_states=True, use_cache=False).hidden_states
    targets = layer_targets(teacher, inputs)
    assert len(targets) == len(states) - 1
    for index, target in enumerate(targets):
        assert torch.equal(target.inputs, states[index])
    assert torch.equal(targets[0].outputs, states[1])


def test_gradients_stay_within_their_layer(student: Any, teacher: Any, inputs: Tensor) -> None:
    damaged = copy.deepcopy(teacher).requires_grad_()
    first = decoder_layers(damaged)[0]
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.add_(0.1)

    found = gradients(layerwise_error(damaged, teacher, inputs), damaged)

    inside = {id(parameter) for parameter in first.parameters()}
    for name, parameter in damaged.named_parameters():
        gradient = found[name]
        if id(parameter) in inside:
            assert gradient is not None
        else:
            assert gradient is None or gradient.abs().max() < 1e-12


def test_at_full_width_nothing_is_left(base: Base, statistics: Statistics, inputs: Tensor) -> None:
    plan = make_plan(base.shape, v_dim=base.shape.kv_dim)
    full = rewrite(base, plan, statistics)

    assert layerwise_error(full, base.model, inputs).item() < 1e-9


def test_hooks_are_gone_afterwards(student: Any, teacher: Any, inputs: Tensor) -> None:
    before = [student(inputs).logits, teacher(inputs).logits]
    layerwise_error(student, teacher, inputs)
    with pytest.raises(IndexError):
        layerwise_error(student, teacher, inputs + 10_000)
    assert torch.equal(student(inputs).logits, before[0])
    assert torch.equal(teacher(inputs).logits, before[1])
    assert not any(layer._forward_pre_hooks for layer in decoder_layers(student))


def test_hidden_states_against_a_plain_loop(student: Any, teacher: Any, inputs: Tensor) -> None:
    ours = student.base_model(inputs, output_hidden_states=True, use_cache=False)
    theirs = teacher.base_model(inputs, output_hidden_states=True, use_cache=False)
    assert torch.equal(ours.hidden_states[-1], ours.last_hidden_state)
    pairs = list(zip(ours.hidden_states, theirs.hidden_states, strict=True))[1:]
    plain = torch.stack([naive(one, other, other) for one, other in pairs]).mean()

    found = hidden_state_error(ours.hidden_states[1:], theirs.hidden_states[1:])

    assert found.item() > 1e-4
    assert found.item() == pytest.approx(plain.item(), rel=1e-10)
    known = gradients(plain, student)
    for name, gradient in gradients(found, student).items():
        if gradient is not None:
            torch.testing.assert_close(gradient, known[name], rtol=1e-9, atol=1e-12)


def test_one_is_the_error_of_the_mean() -> None:
    wanted = 5 + torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(0))
    mean = wanted.mean(1, keepdim=True).expand_as(wanted)
    assert relative_error(mean, wanted, wanted).item() == pytest.approx(1, rel=1e-5)
    assert relative_error(wanted, wanted, wanted).item() == 0


def test_states_of_one_token_leave_the_error_finite() -> None:
    one = torch.ones(1, 1, 4)
    assert relative_error(one, one, one).item() == 0


@pytest.mark.parametrize("goal", ["layers", "hidden"])
def test_bfloat16_autocast_is_close(goal: str, student: Any, teacher: Any, inputs: Tensor) -> None:
    student, teacher = copy.deepcopy(student).float(), copy.deepcopy(teacher).float()

    error = layerwise_error if goal == "layers" else states_error

    exact = error(student, teacher, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        found = error(student, teacher, inputs)
    found.backward()

    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(exact.item(), rel=0.05)


@pytest.mark.parametrize("goal", ["layers", "hidden"])
def test_gradient_checkpointing_changes_nothing(
    goal: str, student: Any, teacher: Any, inputs: Tensor
) -> None:
    error = layerwise_error if goal == "layers" else states_error
    expected = gradients(error(student, teacher, inputs), student)
    saving = copy.deepcopy(student).train()
    saving.gradient_checkpointing_enable({"use_reentrant": False})

    found = error(saving, teacher, inputs)
    found.backward()

    for name, parameter in saving.named_parameters():
        if expected[name] is not None:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-9, atol=1e-12)


def test_hidden_states_are_added_to_the_divergence(
    student: Any, teacher: Any, token_windows: Tensor
) -> None:
    windows = token_windows[:3, :20]
    ours, theirs = (
        model.base_model(windows[:, :-1], output_hidden_states=True, use_cache=False)
        for model in (student, teacher)
    )
    error = hidden_state_error(ours.hidden_states[1:], theirs.hidden_states[1:])
    alone = losses(student, teacher, windows, Objective(kl=0.5, ce=0.25))
    expected = gradients(alone.objective + 57 * 3.0 * error, student)

    found = losses(student, teacher, windows, Objective(kl=0.5, ce=0.25, hidden=3.0))
    only = losses(student, teacher, windows, Objective(kl=0.0, ce=0.0, hidden=3.0))

    assert only.objective.item() == pytest.approx(57 * 3.0 * error.item(), rel=1e-10)
    assert only.cross_entropy.item() == pytest.approx(alone.cross_entropy.item(), rel=1e-10)
    assert found.objective.item() == pytest.approx(
        only.objective.item() + alone.objective.item(), rel=1e-10
    )
    for name, gradient in gradients(found.objective, student).items():
        known = expected[name]  # some norms compute in float32
        assert (gradient - known).norm() <= 1e-5 * known.norm() + 1e-9


def test_single_layers_are_all_that_is_minimised(
    student: Any, teacher: Any, token_windows: Tensor
) -> None:
    windows = token_windows[:9, :20]
    error = layerwise_error(student, teacher, windows[:, :-1])

    found = losses(student, teacher, windows, Objective(kl=1.0, ce=1.0, layers=True))

    assert found.tokens == 9 * 19
    assert found.objective.item() == pytest.approx(9 * 19 * error.item(), rel=1e-10)
    some = losses(student, None, windows[:2], Objective(kl=0.0, ce=1.0))
    assert found.cross_entropy.item() == pytest.approx(4.5 * some.cross_entropy.item())
    assert not found.cross_entropy.requires_grad


def test_the_whole_student_is_what_is_measured(
    student: Any, teacher: Any, token_windows: Tensor
) -> None:
    windows = token_windows[:3, :20]
    expected = losses(student, None, windows, Objective(kl=0.0, ce=1.0)).cross_entropy.item()
    for goal in (Objective(1.0, 0.0, layers=True), Objective(1.0, 0.0, hidden=2.0)):
        found = Distilled(student, teacher, goal)(windows, measure=True)
        assert "loss" not in found
        assert found["cross_entropy"].item() == expected


def test_kept_masses_of_all_tokens_stand_for_the_teacher(
    student: Any, teacher: Any, token_windows: Tensor
) -> None:
    windows, goal = token_windows[:3, :20], Objective(kl=1.0, ce=0.5, temperature=1.5)
    with torch.no_grad():
        logprobs = (teacher(windows[:, :-1]).logits / 1.5).log_softmax(-1)
    top, ids = logprobs.topk(logprobs.shape[-1])
    masses = torch.cat((top, torch.full_like(top[..., :1], -torch.inf)), -1)
    expected = Distilled(student, teacher, goal)(windows)

    found = Distilled(student, None, goal)(windows, top_ids=ids, top_logprobs=masses)

    assert found["loss"].item() == pytest.approx(expected["loss"].item(), rel=1e-10)
    assert found["cross_entropy"].item() == expected["cross_entropy"].item()
    known = gradients(expected["loss"], student)
    for name, gradient in gradients(found["loss"], student).items():
        torch.testing.assert_close(gradient, known[name], rtol=1e-9, atol=1e-12)
