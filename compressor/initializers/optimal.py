"""The output-covariance optimum: the latents that damage the attention's output least.

Attention is linear in V, so what a projection of V costs is W_o^h (I - D_h E) o_h with o_h the
attention's *output*. Its moments, not those of V, decide (DESIGN 3.1).
"""

from __future__ import annotations

import torch
from torch import Tensor

from vdcompress.initializers.base import (
    Initializer,
    Latents,
    ValueProblem,
    leading_eigenvectors,
    per_head,
    square_roots,
)


def solve(problem: ValueProblem) -> Latents:
    """Solve every group in closed form.

    For heads that share a latent, the group's moments are averages over its heads; each head has
    a decoder of its own.
    """
    heads, _hidden, d = problem.o_weight.shape
    outputs = problem.outputs()
    mean = outputs.mean.view(heads, d)
    covariance = head_blocks(outputs.covariance, heads)
    center = _group_average(mean, problem.sharing)
    gram = (problem.o_weight.mT @ problem.o_weight).unflatten(0, (-1, problem.sharing)).sum(1)
    encoder = best_encoder(gram, _group_average(covariance, problem.sharing), problem.width)
    encoders = per_head(encoder, problem.sharing)
    decoder = regression_decoder(encoders, covariance)
    shift = mean - per_head(center, problem.sharing)
    offset = mean - torch.einsum("hdr,hre,he->hd", decoder, encoders, shift)
    return Latents(encoder, decoder, center, offset)


def best_encoder(gram: Tensor, covariance: Tensor, width: int) -> Tensor:
    """Return E [..., r, d]: orthonormal rows that span R_r^T S^(-1/2), W S^(1/2) = U L R^T.

    Args:
        gram: W^T W [..., d, d] of the map that reads the latent's reconstruction.
        covariance: S [..., d, d]; where it is singular the rows are completed to a basis.
        width: r.
    """
    d = gram.shape[-1]
    if width == d:
        return torch.eye(d, dtype=gram.dtype, device=gram.device).expand_as(gram)
    root, inverse = square_roots(covariance)
    rows = leading_eigenvectors(root @ gram @ root, width) @ inverse
    completed: Tensor = torch.linalg.svd(rows, full_matrices=True).Vh
    return completed[..., :width, :]


def regression_decoder(encoder: Tensor, covariance: Tensor) -> Tensor:
    """Return D = S E^T (E S E^T)^(-1) [..., d, r], the least-squares decoder of E [..., r, d].

    Written as E^T + (I - E^T E) S E^T (E S E^T)^+, which keeps E^T along directions without
    variance and is exact at full width.
    """
    transpose = encoder.mT
    cross = covariance @ transpose
    within = torch.linalg.pinv(encoder @ cross, rtol=1e-10, hermitian=True)
    decoder: Tensor = transpose + (cross - transpose @ (encoder @ cross)) @ within
    return decoder


def head_blocks(covariance: Tensor, heads: int) -> Tensor:
    """Return the diagonal blocks [H, d, d] of a joint covariance [H d, H d]."""
    blocks = covariance.unflatten(0, (heads, -1)).unflatten(2, (heads, -1))
    return torch.diagonal(blocks, dim1=0, dim2=2).permute(2, 0, 1)


def _group_average(x: Tensor, sharing: int) -> Tensor:
    """[H, ...] -> [G, ...], the mean over each group's query heads."""
    average: Tensor = x.unflatten(0, (-1, sharing)).mean(1)
    return average


INITIALIZER = Initializer(
    solve, needs=frozenset({"outputs"}), default_refit="local", default_alternate=2
)
