"""Random orthonormal latents per head: what a start is worth when it knows nothing."""

from __future__ import annotations

import torch

from vdcompress.initializers.base import Initializer, Latents, ValueProblem, orthogonal


def solve(problem: ValueProblem) -> Latents:
    """Draw E [r, d] of each head from the Haar measure; the bias of V is folded exactly."""
    groups, d, _hidden = problem.v_weight.shape
    normal = torch.randn(groups, d, problem.width, generator=problem.generator, dtype=torch.float64)
    encoder = torch.linalg.qr(normal).Q.mT.to(problem.v_weight.device)
    return orthogonal(problem, encoder, problem.v_bias)


INITIALIZER = Initializer(solve, needs=frozenset())
