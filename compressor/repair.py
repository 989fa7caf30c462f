"""Refit the output projections to what the compressed attention really returns.

Compressed keys change where attention looks, and heads that share a latent average it each in
their own way: no moments of the base say what comes out. So the compressed attention runs on the
base's own inputs, beside the base's, and the output projection becomes the linear regression of the
base's output on it. Closed form, one pass (the ``local`` target of DESIGN 3.2).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vdcompress.events import OnEvent, Progress, ignore
from vdcompress.latents.refit import regress
from vdcompress.load import Base
from vdcompress.plan import Plan


def needs_repair(plan: Plan) -> bool:
    """Say whether a plan's refit takes a run of the compressed attention."""
    return plan.start.refit == "local" and any(
        changes(plan, index) for index in range(plan.shape.layers)
    )


def repair(
    base: Base,
    model: PreTrainedModel,
    plan: Plan,
    windows: Tensor,
    *,
    batch: int = 1,
    on_event: OnEvent = ignore,
) -> PreTrainedModel:
    """Refit the output projection of every layer whose keys changed or whose values are shared.

    Args:
        base: the model before compression.
        model: what ``rewrite`` made of it; its output projections are replaced, everything else
            stays, and it is returned.
        plan: of ``model``.
        windows: token ids [n, length], the calibration's. A regression on few tokens does harm.
        batch: windows per forward pass.
        on_event: gets one :class:`Progress` of stage ``repair`` per batch.
    """
    family, storage = base.family, getattr(torch, base.dtype)
    before, after = family.attention_modules(base.model), family.attention_modules(model)
    fits = {
        index: Fit(after[index], family.output_projection(after[index]))
        for index in range(plan.shape.layers)
        if changes(plan, index)
    }
    device = next(base.model.parameters()).device
    with beside([(before[index], fit) for index, fit in fits.items()]), torch.inference_mode():
        for start in range(0, len(windows), batch):
            ids = windows[start : start + batch].to(device)
            base.model.base_model(ids, use_cache=False)
            on_event(Progress("repair", min(start + batch, len(windows))))
    for fit in fits.values():
        fit.replace(storage)
    return model


def changes(plan: Plan, index: int) -> bool:
    """Say whether the attention of a layer returns something that base moments do not tell."""
    shape, layer = plan.shape, plan.layers[index]
    shared = layer.v_groups < shape.kv_heads and layer.v_dim < shape.kv_dim
    return shared or layer.k_dim < shape.kv_dim


class Fit:
    """Joint moments of one layer's attended latents z [tokens, n] and the base's output y."""

    def __init__(self, attention: nn.Module, projection: nn.Module) -> None:
        self.attention, self.projection = attention, projection
        self.count = 0
        self.z = self.y = self.zz = self.yz = torch.zeros((), dtype=torch.float64)

    def add(self, args: Any, kwargs: Any, output: Tensor) -> None:
        """Run the compressed attention on what the base's was given; ``output`` [b, t, hidden]."""
        seen: list[Tensor] = []
        cos, sin = kwargs["position_embeddings"]  # the base's tables hold each pair's angle twice
        half = cos.shape[-1] // 2
        kwargs = kwargs | {"position_embeddings": (cos[..., :half], sin[..., :half])}
        hook = self.projection.register_forward_pre_hook(lambda _m, given: seen.append(given[0]))
        try:
            self.attention(*args, **kwargs)
        finally:
            hook.remove()
        z, y = seen[0].flatten(0, 1).double(), output.flatten(0, 1).double()
        self.count += len(z)
        self.z, self.y = self.z.to(z.device) + z.sum(0), self.y.to(z.device) + y.sum(0)
        self.zz, self.yz = self.zz.to(z.device) + z.mT @ z, self.yz.to(z.device) + y.mT @ z

    def replace(self, storage: torch.dtype) -> None:
        """Put the regression in place of the projection's weights, rounded to ``storage``."""
        z, y = self.z / self.count, self.y / self.count
        within = self.zz / self.count - torch.outer(z, z)
        cross = self.yz / self.count - torch.outer(y, z)
        module: Any = self.projection
        weight = regress(within, cross, module.weight.double())
        bias = y - weight @ z
        for name, tensor in (("weight", weight), ("bias", bias)):
            working = getattr(module, name).dtype
            setattr(module, name, nn.Parameter(tensor.to(storage).to(working)))


@contextmanager
def beside(pairs: list[tuple[nn.Module, Fit]]) -> Iterator[None]:
    """Let each fit see what the base's attention is given and returns, for the time of a block."""

    def hook(fit: Fit) -> Any:
        return lambda _module, args, kwargs, output: fit.add(args, kwargs, output[0])

    with ExitStack() as stack:
        for attention, fit in pairs:
            handle = attention.register_forward_hook(hook(fit), with_kwargs=True)
            stack.callback(handle.remove)
        yield
