"""The PCA of activations, with the mean folded into the bias."""

from __future__ import annotations

from vdcompress.initializers.base import Initializer
from vdcompress.latents.lowrank import leading_eigenvectors
from vdcompress.latents.values import Latents, ValueProblem, orthogonal


def solve(problem: ValueProblem) -> Latents:
    """Keep the leading principal components of each latent's stacked values.

    The same subspace as ``sklearn.decomposition.PCA`` on the values themselves, from their
    covariance, so that no activation is kept.
    """
    values = problem.values()
    encoder = leading_eigenvectors(values.covariance, problem.width)
    return orthogonal(problem, encoder, values.mean)


INITIALIZER = Initializer(solve, needs=frozenset({"values"}))
