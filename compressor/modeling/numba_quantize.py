"""Packing latents on a CPU by one kernel, what :class:`Quantizer` does in some thirty operations.

Shapes: b sequences, g latents, s tokens, w width.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

from .numba_quantize_kernels import quantize
from .quantizer import Packed, Quantizer
from .quantizer_affine import range_scale
from .quantizer_normal import NormalQuantizer
from .schemes import NORMAL, codes_per_word, zero_unit


def quantize_into(quantizer: Quantizer, x: Tensor, into: Packed) -> None:
    """Write the same bits as ``quantizer.quantize(x)`` yields.

    Args:
        quantizer: with scales per token.
        x: [b, g, s, w].
        into: views of rooms.
    """
    bits, runs = quantizer.bits, codes_per_word(quantizer.bits)
    levels, limits = _levels(quantizer.scheme.name, bits)
    room = np.empty(1, np.float32)
    scales = into.scale.view(torch.int16).numpy().view(np.uint16)
    quantize(
        x.detach().float().numpy(),
        into.codes.numpy(),
        scales,
        into.codes.numpy() if into.zero is None else into.zero.numpy(),
        bits,
        runs,
        np.float32(range_scale(bits)),
        np.float32(zero_unit(bits)),
        limits,
        levels,
        np.empty(-(-x.shape[3] // runs) * runs, np.uint8),
        room,
        room.view(np.uint32),
    )


@cache
def _levels(scheme: str, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the levels of normal numbers and the limits between them, none for others."""
    if scheme != NORMAL.name:
        return np.empty(0, np.float32), np.empty(0, np.float32)
    levels, limits = NormalQuantizer(NORMAL, bits).levels_and_limits()
    return levels.numpy(), limits.numpy()
