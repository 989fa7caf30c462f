"""The SVD of the value projection: needs no data."""

from __future__ import annotations

import torch

from vdcompress.initializers.base import (
    Initializer,
    Latents,
    ValueProblem,
    leading_eigenvectors,
    orthogonal,
)


def solve(problem: ValueProblem) -> Latents:
    """Keep the leading left singular vectors of each head's W_v [d, hidden].

    Eckart-Young: the best rank-r approximation of the weights. The textbook baseline: the bias of V
    is projected with the rest, nothing is folded.
    """
    gram = problem.v_weight @ problem.v_weight.mT
    encoder = leading_eigenvectors(gram, problem.width)
    return orthogonal(problem, encoder, torch.zeros_like(problem.v_bias))


INITIALIZER = Initializer(solve, needs=frozenset())
