"""Match hidden states: the student's state after each layer with its teacher's.

States of different layers differ in scale by orders of magnitude, so each layer's squared error is
taken in units of what there is to explain: the teacher's squared distance from its own mean. 0 is
agreement; 1 is what the mean state, the best constant, would cost.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def hidden_state_error(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Return the mean over layers of :func:`relative_error`, with gradient.

    Args:
        student: states [..., hidden] after each layer, as transformers' ``hidden_states`` without
            the embeddings: the last one is after the final norm.
        teacher: the same of the teacher; gets no gradients.
    """
    errors = [
        relative_error(ours, theirs, theirs) for ours, theirs in zip(student, teacher, strict=True)
    ]
    return torch.stack(errors).mean()


def relative_error(found: Tensor, wanted: Tensor, reference: Tensor) -> Tensor:
    """Return ||found - wanted||^2 / ||reference - its mean over tokens||^2, float32 or float64.

    Each window has its own denominator, so that the mean over windows does not depend on how many
    of them a forward pass takes.

    Args:
        found: [..., tokens, hidden]; gets gradients.
        wanted: [..., tokens, hidden]; gets none.
        reference: [..., tokens, hidden], of the same tokens; gets no gradients.
    """
    wide = torch.float64 if found.dtype == torch.float64 else torch.float32
    with torch.autocast(found.device.type, enabled=False):
        error = (found.to(wide) - wanted.detach().to(wide)).square().mean((-2, -1))
        spread = reference.detach().to(wide).var(-2, correction=0).mean(-1)
        return (error / spread.clamp_min(torch.finfo(wide).tiny)).mean()
