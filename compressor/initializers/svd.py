"""The SVD of the projections: needs no data."""

from __future__ import annotations

import torch

from vdcompress.initializers.base import Initializer
from vdcompress.latents.keys import KeyMetric, KeyProblem
from vdcompress.latents.lowrank import leading_eigenvectors
from vdcompress.latents.values import Latents, ValueProblem, orthogonal
from vdcompress.statistics import Moments


def solve(problem: ValueProblem) -> Latents:
    """Keep the leading left singular vectors of each latent's W_v [n, hidden].

    Eckart-Young: the best rank-r approximation of the weights. The textbook baseline: the bias of V
    is projected with the rest, nothing is folded.
    """
    gram = problem.v_weight @ problem.v_weight.mT
    encoder = leading_eigenvectors(gram, problem.width)
    return orthogonal(problem, encoder, torch.zeros_like(problem.v_bias))


def keys(problem: KeyProblem) -> KeyMetric:
    """Keep the leading left singular vectors of W_k; nothing is centred."""
    weight = problem.k_weight.unflatten(0, (problem.groups, -1)).flatten(1, 2)
    gram = weight @ weight.mT
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return KeyMetric(identity.expand_as(gram), Moments(torch.zeros_like(gram[..., 0]), gram, 0))


INITIALIZER = Initializer(solve, needs=frozenset(), keys=keys, key_needs=frozenset())
