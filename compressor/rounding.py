"""Weights as they will be saved."""

from __future__ import annotations

import torch
from torch import nn


def round_weights(model: nn.Module, dtype: str) -> None:
    """Round every parameter in place to what ``dtype`` can hold, so that what is measured is saved.

    Args:
        model: its parameters keep their own dtype.
        dtype: ``float32``, ``float16`` or ``bfloat16``.
    """
    storage = getattr(torch, dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(storage))
