"""Fully sharded training (FSDP2) through accelerate: what it needs from us.

A launcher asks for it: ``accelerate launch --use_fsdp --fsdp_version 2``, or ``torchrun`` with
ACCELERATE_USE_FSDP=true and FSDP_VERSION=2. Models are sharded as copies, so that those of the
caller stay whole.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, TypeVar

import torch
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import Tensor, nn

from vdcompress.errors import UsageError
from vdcompress.healing import processes

if TYPE_CHECKING:
    from accelerate import Accelerator

Model = TypeVar("Model", bound=nn.Module)
_WRAPPER = "_checkpoint_wrapped_module."


def asked_for() -> bool:
    """Say whether the launcher asks for sharded models."""
    import os

    asked = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    return asked and processes.count() > 1


def settle(accelerator: Accelerator) -> None:
    """Make an accelerator shard as healing needs it.

    On CPUs accelerate does not shard by itself (1.15), only its own choice forbids it. Gradients
    are added up in float32, and losses leave the model as they are computed.

    Raises:
        UsageError: another way of sharding is asked for.
    """
    state = accelerator.state
    if asked_for() and state.distributed_type == DistributedType.MULTI_CPU:
        state.distributed_type = DistributedType.FSDP
        state.fsdp_plugin = FullyShardedDataParallelPlugin()
        if state.mixed_precision != "no":
            state.fsdp_plugin.set_mixed_precision(state.mixed_precision)
    plugin = getattr(state, "fsdp_plugin", None)
    if plugin is not None and plugin.fsdp_version != 2:
        raise UsageError(
            "healing shards models by FSDP2 only", "set --fsdp_version 2, or FSDP_VERSION=2"
        )
    if state.distributed_type == DistributedType.DEEPSPEED:
        raise UsageError("healing does not run under DeepSpeed", "shard with FSDP2 instead")
    if plugin is not None and plugin.mixed_precision_policy is not None:
        from torch.distributed.fsdp import MixedPrecisionPolicy

        dtype = plugin.mixed_precision_policy.param_dtype
        plugin.mixed_precision_policy = MixedPrecisionPolicy(dtype, torch.float32)


def to_shard(model: Model) -> Model:
    """Return a copy of a model with parameters of its own on the same memory.

    Sharding replaces a module's parameters by shards of them, so the model itself stays as it is.
    """
    known: dict[int, object] = {
        id(parameter): nn.Parameter(parameter.detach(), parameter.requires_grad)
        for parameter in model.parameters()
    }
    return copy.deepcopy(model, known)


def layers_of(model: nn.Module) -> list[str]:
    """Return the names of the classes of a model's layers, each of which is a unit to gather."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    found = {type(m).__name__ for m in model.modules() if isinstance(m, GradientCheckpointingLayer)}
    return sorted(found)


def named(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that train, by the names that they have in the model unwrapped."""
    return {
        name.replace(_WRAPPER, ""): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def whole(parameter: Tensor) -> Tensor:
    """Return a copy of a parameter on the CPU, gathered if it is sharded: all processes call it."""
    from torch.distributed.tensor import DTensor

    parameter = parameter.detach()
    full = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
    return full.to("cpu", copy=True)


def assign(parameters: dict[str, nn.Parameter], values: dict[str, Tensor]) -> None:
    """Give parameters, sharded or not, new values that are whole; all processes call it."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    with torch.no_grad():
        for name, parameter in parameters.items():
            value = values[name]
            if isinstance(parameter, DTensor):
                mesh = parameter.device_mesh
                value = distribute_tensor(value.to(mesh.device_type), mesh, parameter.placements)
            parameter.copy_(value)


def reshard(model: nn.Module) -> None:
    """Free what a forward pass without a backward pass has gathered."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
