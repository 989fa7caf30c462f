"""The PCA of V activations, per head, with the mean folded into the bias."""

from __future__ import annotations

from vdcompress.initializers.base import (
    Initializer,
    Latents,
    ValueProblem,
    leading_eigenvectors,
    orthogonal,
)


def solve(problem: ValueProblem) -> Latents:
    """Keep the leading principal components of each head's values.

    The same subspace as ``sklearn.decomposition.PCA`` on the values themselves, from their
    covariance, so that no activation is kept.
    """
    values = problem.values()
    encoder = leading_eigenvectors(values.covariance, problem.width)
    return orthogonal(problem, encoder, values.mean)


INITIALIZER = Initializer(solve, needs=frozenset({"values"}))
