"""Calibrate and rewrite a base layer by layer: from its shards into new ones, none held whole."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from vdcompress.calibrate import PULLS
from vdcompress.events import OnEvent, Progress, ignore
from vdcompress.layerwise import (
    CalibratedLayer,
    HiddenStates,
    Stack,
    calibrate_layers,
    stored_shapes,
)
from vdcompress.load import BaseConfig
from vdcompress.plan import Plan
from vdcompress.repair import Fit, beside, changes, needs_repair
from vdcompress.rewrite import layer_state, needed_statistics, require_supported
from vdcompress.shards import Checkpoint, ShardWriter


def write_compressed(
    base: BaseConfig,
    plan: Plan,
    windows: Tensor,
    folder: Path,
    *,
    max_shard_size: str,
    states_in: Path | None = None,
    device: str = "cpu",
    on_event: OnEvent = ignore,
) -> None:
    """Write the weights of the compressed model that ``plan`` describes into a folder.

    What is written equals what :func:`~vdcompress.rewrite.rewrite`, and then
    :func:`~vdcompress.repair.repair`, make of the same windows without statistics that take
    gradients. Held in memory are one layer, its statistics, and the hidden states of the windows.

    Args:
        base: where the base's weights are; ``dtype`` is that of the written ones.
        plan: the decision.
        windows: the calibration's token ids [n, length].
        folder: gets the shards and their index; it holds no weights yet.
        max_shard_size: such as ``5GB``.
        states_in: keep the hidden states in a temporary file in this folder, not in memory.
        device: where to calculate.
        on_event: gets one :class:`Progress` of stage ``compress`` per layer.

    Raises:
        PlanError: for a plan of another shape.
        ModelError: weights are missing, damaged or overflow.
    """
    require_supported(base.shape, plan)
    stack = base_stack(base, device)
    compressed = base.family.compressed_on_meta(base.config, plan).eval()
    state = compressed.state_dict()
    left = {name: state[name] for name in stored_shapes(compressed)}
    storage = getattr(torch, base.dtype)
    needs = needed_statistics(plan.start, plan.shape, plan) - {PULLS}
    twice = {i for i in range(len(stack)) if needs_repair(plan) and changes(plan, i)}
    with (
        HiddenStates(len(windows), windows.shape[1], stack.width, states_in) as hidden,
        ShardWriter(folder, left, storage, max_shard_size) as writer,
    ):
        stack.embed(windows, hidden)
        for layer in calibrate_layers(stack, base.family, hidden, needs, twice=twice):
            weights = base.family.weights(layer.attention)
            found = layer_state(base, plan, layer.index, weights, layer.statistics)
            if layer.index in twice:
                attention = base.family.attention_modules(compressed)[layer.index]
                _assign(attention, found, base.family.parameter_prefix(layer.index))
                found = _repaired(base, stack, hidden, layer, attention)
            for name, tensor in found.items():
                writer.write(name, tensor)
                left.pop(name)
            on_event(Progress("compress", layer.index + 1))
        for name in left:
            writer.copy(name, stack.checkpoint)


def base_stack(base: BaseConfig, device: str = "cpu") -> Stack:
    """Return a base that is run layer by layer."""
    family = base.family
    checkpoint = Checkpoint(base.folder, family.stored_as)
    return Stack(family.base_on_meta(base.config), family.layers_prefix(), checkpoint, device)


def compressed_stack(base: BaseConfig, plan: Plan, folder: Path, device: str = "cpu") -> Stack:
    """Return what :func:`write_compressed` wrote, run layer by layer."""
    family = base.family
    model = family.compressed_on_meta(base.config, plan)
    return Stack(model, family.layers_prefix(), Checkpoint(folder), device)


def _repaired(
    base: BaseConfig,
    stack: Stack,
    hidden: HiddenStates,
    layer: CalibratedLayer,
    attention: nn.Module,
) -> dict[str, Tensor]:
    """Run a layer again, its compressed attention beside it; return the latter's tensors."""
    fit = Fit(attention, base.family.output_projection(attention))
    stack.recall()
    with beside([(layer.attention, fit)]):
        for _ in stack.run(hidden):
            pass
    fit.replace(getattr(torch, base.dtype))
    prefix = base.family.parameter_prefix(layer.index)
    found = {prefix + name: tensor for name, tensor in attention.state_dict().items()}
    attention.to("meta")
    return found


def _assign(module: nn.Module, state: dict[str, Tensor], prefix: str) -> None:
    """Give a module on the meta device its tensors, named with a prefix."""
    own = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    module.load_state_dict(own, strict=True, assign=True)
