"""RoPE over the frequencies that a compressed model keeps."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init


class LatentRotaryEmbedding(nn.Module):
    """cos and sin [b, t, pairs] of explicit inverse frequencies, in float32 whatever the model's.

    The buffer is rebuilt from the config whenever the module moves or changes its dtype, and by
    ``_init_weights`` after ``from_pretrained``, which otherwise leaves it uninitialised.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.frequencies = tuple(config.inv_freq or ())
        self.rope_scale = config.rope_scale
        self.register_buffer("inv_freq", self._table(), persistent=False)
        self.inv_freq: Tensor

    def _table(self, device: Any = None) -> Tensor:
        """Return the config's frequencies; models are built with other default dtypes too."""
        return torch.tensor(self.frequencies, dtype=torch.float32, device=device)

    def refill(self) -> None:
        """Write the config's frequencies into the buffer."""
        init.copy_(self.inv_freq, self._table(self.inv_freq.device))

    def _apply(self, fn: Any, recurse: bool = True) -> LatentRotaryEmbedding:
        if self.inv_freq.is_meta:
            self.inv_freq = self._table("cpu")
        super()._apply(fn, recurse)
        self.inv_freq = self._table(self.inv_freq.device)
        return self

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return cos and sin in the dtype of ``x`` for positions [b, t]."""
        angles = position_ids[..., None].float() * self.inv_freq
        cos, sin = angles.cos() * self.rope_scale, angles.sin() * self.rope_scale
        return cos.to(x.dtype), sin.to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first ``2 * pairs`` dimensions of ``x`` [b, h, t, width]; the rest passes.

    Args:
        x: the first members of all pairs, then the second ones, then unrotated dimensions.
        cos: [b, t, pairs].
        sin: [b, t, pairs].
    """
    pairs = cos.shape[-1]
    if pairs == 0:
        return x
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    first, second, rest = x.split([pairs, pairs, x.shape[-1] - 2 * pairs], dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)


def of_frequencies(cos: Tensor, sin: Tensor, frequencies: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return cos and sin [b, t, pairs] of kept frequencies, which may be kept more than once."""
    if frequencies == tuple(range(cos.shape[-1])):
        return cos, sin
    kept: Any = list(frequencies)
    if not torch.compiler.is_compiling():
        kept = _numbers(frequencies, cos.device)
    return cos[..., kept], sin[..., kept]


@cache
def _numbers(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """Return numbers as a tensor; made anew a GPU would wait for them in every layer."""
    with torch.inference_mode(False):
        return torch.tensor(numbers, dtype=torch.long, device=device)
