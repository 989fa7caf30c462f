"""Measure a base model's activations on text: streaming moments, no activations kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vdcompress.errors import DataError, ModelError
from vdcompress.events import OnEvent, Progress, ignore
from vdcompress.families import Family
from vdcompress.load import Base
from vdcompress.plan import ModelShape
from vdcompress.statistics import LayerStatistics, MomentSum, Statistics

VALUES, OUTPUTS = "values", "outputs"
EVERYTHING = frozenset({VALUES, OUTPUTS})
TOKENS_PER_DIMENSION = 4


def calibrate(
    base: Base,
    windows: Tensor,
    *,
    needs: frozenset[str] = EVERYTHING,
    batch: int = 1,
    on_event: OnEvent = ignore,
) -> Statistics:
    """Run the base's body over token windows and return the moments that a start needs.

    Args:
        base: the loaded base model; hooks are removed however this ends.
        windows: token ids [n, length].
        needs: which moments, of ``values`` and ``outputs``; fewer cost less time.
        batch: windows per forward pass.
        on_event: gets one :class:`Progress` per batch.

    Raises:
        DataError: for fewer tokens than the widest covariance needs (says how many it wants).
        ModelError: for a NaN or an infinity, with the name of the layer.
    """
    require_enough_tokens(base.shape, windows.numel(), needs)
    sums: list[dict[str, MomentSum]] = [
        {name: MomentSum() for name in needs} for _ in range(base.shape.layers)
    ]
    device = next(base.model.parameters()).device
    with _hooked(base.family, base.model, sums, needs), torch.inference_mode():
        for start in range(0, len(windows), batch):
            base.model.base_model(windows[start : start + batch].to(device), use_cache=False)
            _require_finite(base.family, sums)
            on_event(Progress("calibrate", min(start + batch, len(windows))))
    layers = tuple(
        LayerStatistics(**{name: total.moments() for name, total in layer.items()})
        for layer in sums
    )
    return Statistics(layers, windows.numel())


def require_enough_tokens(shape: ModelShape, tokens: int, needs: frozenset[str]) -> None:
    """Raise :class:`DataError` if a covariance would rest on too few tokens.

    The widest covariance spans all heads' outputs (or one head's values); each of its dimensions
    wants four tokens, below which its small eigenvalues are noise.
    """
    width = shape.heads * shape.head_dim if OUTPUTS in needs else shape.head_dim
    wanted = TOKENS_PER_DIMENSION * width if needs else 0
    if tokens < wanted:
        raise DataError(
            f"{tokens} calibration tokens are too few for a covariance of width {width}",
            f"it wants at least {wanted}: raise --samples or --seq-len",
        )


@contextmanager
def _hooked(
    family: Family, model: nn.Module, sums: list[dict[str, MomentSum]], needs: frozenset[str]
) -> Iterator[None]:
    """Attach the taps for the time of a block."""
    with ExitStack() as stack:
        for layer, attention in zip(sums, family.attention_modules(model), strict=True):
            if VALUES in needs:
                tap = family.value_tap(attention)
                hook: Callable[..., None] = partial(_add_values, layer[VALUES], tap.read)
                stack.callback(tap.module.register_forward_hook(hook).remove)
            if OUTPUTS in needs:
                output = family.output_projection(attention)
                hook = partial(_add_outputs, layer[OUTPUTS])
                stack.callback(output.register_forward_pre_hook(hook).remove)
        yield


def _add_values(
    total: MomentSum, read: Callable[[Tensor], Tensor], _module: nn.Module, _args: Any, out: Tensor
) -> None:
    total.add(read(out).flatten(0, 1))


def _add_outputs(total: MomentSum, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
    total.add(args[0].flatten(0, 1))


def _require_finite(family: Family, sums: list[dict[str, MomentSum]]) -> None:
    for index, layer in enumerate(sums):
        for name, total in layer.items():
            if not total.finite():
                where = family.parameter_prefix(index).rstrip(".")
                raise ModelError(
                    f"NaN or infinity in the attention {name} of {where}",
                    "the checkpoint is damaged, or it overflows in this dtype",
                )
