"""Layer-wise reconstruction: each of the student's layers learns to do what its teacher's does.

The teacher runs once and gives the input x and the output y of every decoder layer. The student
runs once too, but each of its layers gets the teacher's x instead of what the layer before it
returned, under the same mask and positions. So the layers are independent problems: the error of
one has no gradient in another, and errors do not pile up from layer to layer.

A layer f returns its input plus an update, and the input passes unchanged in teacher and student,
so ||f(x) - y||^2 is the error of the update alone. It is taken in units of what the layer adds,
the squared distance of the update y - x from its mean over tokens: 0 is agreement, 1 is the best
constant update. Units of y's own variance would count a layer for less the more the layers before
it have put into the residual stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vdcompress import families
from vdcompress.healing.hidden_states import relative_error

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class LayerTarget:
    """What a decoder layer of the teacher was given and what it returned, [b, t, hidden]."""

    inputs: Tensor
    outputs: Tensor


def layerwise_error(student: PreTrainedModel, teacher: PreTrainedModel, inputs: Tensor) -> Tensor:
    """Return the mean over layers of the relative error of each layer's update, with gradient.

    Args:
        student: base or compressed model of a family; gradients stay within each layer, and reach
            neither embeddings nor the final norm.
        teacher: a model of as many layers and the same hidden size; runs without gradients.
        inputs: token ids [b, t].
    """
    targets = layer_targets(teacher, inputs)
    errors: list[Tensor] = []
    with ExitStack() as stack:
        for layer, target in zip(decoder_layers(student), targets, strict=True):
            stack.enter_context(_compared(layer, target, errors.append))
        student.base_model(input_ids=inputs, use_cache=False)
    return torch.stack(errors).mean()


@torch.no_grad()
def layer_targets(teacher: PreTrainedModel, inputs: Tensor) -> list[LayerTarget]:
    """Return what each decoder layer of a model does on token ids [b, t], in order."""
    found: list[LayerTarget] = []

    def note(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        found.append(LayerTarget(_state(args, kwargs), _first(output)))

    with ExitStack() as stack:
        for layer in decoder_layers(teacher):
            stack.callback(layer.register_forward_hook(note, with_kwargs=True).remove)
        teacher.base_model(input_ids=inputs, use_cache=False)
    return found


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """Return the decoder layers of a model of any family, base or compressed."""
    kind = model.config.model_type.removeprefix(families.COMPRESSED_PREFIX)
    return families.get(kind).layers(model)


@contextmanager
def _compared(
    layer: nn.Module, target: LayerTarget, on_error: Callable[[Tensor], None]
) -> Iterator[None]:
    """Give a layer the teacher's input, whatever it is called with, and compare its output."""

    def give(_: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        inputs = target.inputs.to(_state(args, kwargs).dtype)
        if args:
            return (inputs, *args[1:]), kwargs
        return args, kwargs | {"hidden_states": inputs}

    def compare(_: nn.Module, __: Any, output: Any) -> None:
        update = target.outputs - target.inputs
        on_error(relative_error(_first(output), target.outputs, update))

    hooks = [
        layer.register_forward_pre_hook(give, with_kwargs=True),
        layer.register_forward_hook(compare),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _state(args: Any, kwargs: Any) -> Tensor:
    found: Tensor = args[0] if args else kwargs["hidden_states"]
    return found


def _first(output: Any) -> Tensor:
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found
