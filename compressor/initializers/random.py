"""Random orthonormal latents: what a start is worth when it knows nothing."""

from __future__ import annotations

import torch

from vdcompress.initializers.base import Initializer
from vdcompress.latents.keys import KeyMetric, KeyProblem
from vdcompress.latents.values import Latents, ValueProblem, orthogonal
from vdcompress.statistics import Moments


def solve(problem: ValueProblem) -> Latents:
    """Draw E [r, n] of each latent from the Haar measure; the bias of V is folded exactly."""
    groups, n, _hidden = problem.v_weight.shape
    normal = torch.randn(groups, n, problem.width, generator=problem.generator, dtype=torch.float64)
    encoder = torch.linalg.qr(normal).Q.mT.to(problem.v_weight.device)
    return orthogonal(problem, encoder, problem.v_bias)


def keys(problem: KeyProblem) -> KeyMetric:
    """Pretend that the keys have a random covariance; nothing is centred."""
    groups, device = problem.groups, problem.k_weight.device
    n = problem.k_weight[..., 0].numel() // groups
    normal = torch.randn(groups, n, n, generator=problem.generator, dtype=torch.float64).to(device)
    nothing = torch.zeros(groups, n, dtype=torch.float64, device=device)
    identity = torch.eye(n, dtype=torch.float64, device=device).expand(groups, n, n)
    return KeyMetric(identity, Moments(nothing, normal @ normal.mT, 0))


INITIALIZER = Initializer(solve, needs=frozenset(), keys=keys, key_needs=frozenset())
