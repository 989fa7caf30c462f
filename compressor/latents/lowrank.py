"""Weighted low-rank approximation: the one optimum that every latent is an instance of.

A latent keeps r of n directions of x. What reads it weighs an error e by e^H M e, and x has the
covariance C, so with P = I - D E the damage is tr(M P C P^H). Its minimum keeps the leading
singular directions of M^(1/2) C^(1/2) (Eckart-Young), whatever M and C are: the initialisers
differ in them alone. All functions take real or complex matrices, float64, with any leading batch
dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor

SINGULAR = 1e-10


def best_encoder(reading: Tensor, spread: Tensor, width: int) -> Tensor:
    """Return E [..., r, n]: orthonormal rows that span R_r^H C^(-1/2), M^(1/2) C^(1/2) = U L R^H.

    Args:
        reading: M [..., n, n], how an error is weighed.
        spread: C [..., n, n]; where it is singular the rows are completed to a basis.
        width: r.
    """
    n = spread.shape[-1]
    if width == n:
        return torch.eye(n, dtype=spread.dtype, device=spread.device).expand_as(spread)
    root, inverse = square_roots(spread)
    rows = leading_eigenvectors(root @ reading @ root, width) @ inverse
    completed: Tensor = torch.linalg.svd(rows, full_matrices=True).Vh
    return completed[..., :width, :]


def regression_decoder(encoder: Tensor, spread: Tensor) -> Tensor:
    """Return D = C E^H (E C E^H)^(-1) [..., n, r], the least-squares decoder of E [..., r, n].

    Written as E^H + (I - E^H E) C E^H (E C E^H)^+, which keeps E^H along directions without
    variance and is exact at full width.
    """
    transpose = encoder.mH
    cross = spread @ transpose
    within = torch.linalg.pinv(encoder @ cross, rtol=SINGULAR, hermitian=True)
    decoder: Tensor = transpose + (cross - transpose @ (encoder @ cross)) @ within
    return decoder


def gains(reading: Tensor, spread: Tensor) -> Tensor:
    """Return the squared singular values of M^(1/2) C^(1/2), falling, [..., n].

    The sum of those from the r-th on is the damage of the best latent of width r.
    """
    root, _ = square_roots(spread)
    values: Tensor = torch.linalg.eigvalsh(root @ reading @ root)
    return values.flip(-1).clamp_min(0)


def leading_eigenvectors(hermitian: Tensor, width: int) -> Tensor:
    """Return the ``width`` leading eigenvectors as rows [..., width, n] of [..., n, n]."""
    vectors: Tensor = torch.linalg.eigh(hermitian).eigenvectors
    return vectors.flip(-1)[..., :width].mH


def square_roots(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Return C^(1/2) and its pseudo-inverse, [..., n, n].

    Eigenvalues below 1e-10 of the largest count as zero.
    """
    values, vectors = torch.linalg.eigh(covariance)
    tiny = torch.finfo(values.dtype).tiny
    kept = values > SINGULAR * values[..., -1:].clamp_min(tiny)
    roots = values.clamp_min(0).sqrt() * kept
    inverse = torch.where(kept, 1 / roots.clamp_min(tiny), 0.0)
    return tuple((vectors * scale.unsqueeze(-2)) @ vectors.mH for scale in (roots, inverse))


def diagonal_blocks(joint: Tensor, count: int) -> Tensor:
    """Return the ``count`` diagonal blocks [count, n, n] of a matrix [count n, count n]."""
    blocks = joint.unflatten(0, (count, -1)).unflatten(2, (count, -1))
    return torch.diagonal(blocks, dim1=0, dim2=2).permute(2, 0, 1)


def block_diagonal(blocks: Tensor, count: int) -> Tensor:
    """Join [count m, d, d] to ``count`` block-diagonal matrices [count, m d, m d]."""
    return torch.stack([torch.block_diag(*part) for part in blocks.unflatten(0, (count, -1))])
