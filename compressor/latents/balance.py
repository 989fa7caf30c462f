"""The basis in which a latent loses least when its numbers are rounded.

A rotated latent z of r numbers with covariance C, rounded with one step for all of them, gets an
error of covariance c tr(C)/r I, c the quantiser's relative error. What reads z weighs it by W, so
the damage is c tr(C) tr(W) / r. In another basis T z it is c tr(P C) tr(P^(-1) W) / r with
P = T^H T, and by Cauchy and Schwarz

    tr(P C) tr(P^(-1) W)  >=  (tr (C^(1/2) W C^(1/2))^(1/2))^2,

with equality for the geometric mean of C^(-1) and W: then T C T^H = T^(-H) W T^(-1) = S, the
singular values of W^(1/2) C^(1/2). Orthonormal latents (T = 1) and whitened ones both lose more.
"""

from __future__ import annotations

import torch
from torch import Tensor

FLOOR = 1e-2


def balance(spread: Tensor, reading: Tensor) -> tuple[Tensor, Tensor]:
    """Return T and T^(-1), [..., r, r], real or complex, float64.

    Args:
        spread: C [..., r, r], covariance of the latent.
        reading: W [..., r, r], how an error of it is weighed.

    Directions that hardly matter, with singular values below 1% of the largest, are scaled as
    if they were of that size, so that T stays well conditioned.
    """
    values, vectors = torch.linalg.eigh(spread)
    root = _floored(values, FLOOR**2).sqrt()
    inner = (vectors.mH @ reading @ vectors) * root.unsqueeze(-1) * root.unsqueeze(-2)
    squares, turned = torch.linalg.eigh(inner)
    scale = _floored(squares, FLOOR**2).pow(0.25)
    basis = (vectors / root.unsqueeze(-2)) @ turned
    back = (vectors * root.unsqueeze(-2)) @ turned
    return (basis * scale.unsqueeze(-2)).mH, back / scale.unsqueeze(-2)


def rounding_loss(singular_values: Tensor) -> Tensor:
    """Return the damage of rounding balanced latents of each width, per unit of relative error.

    Args:
        singular_values: of M^(1/2) C^(1/2), falling, [..., n].

    Returns:
        ``(s_1 + ... + s_r)^2 / r`` for r = 1..n, [..., n]; a quantiser whose error has c times the
        variance of what it rounds loses c times that.
    """
    widths = torch.arange(1, singular_values.shape[-1] + 1, device=singular_values.device)
    return singular_values.cumsum(-1).square() / widths


def _floored(values: Tensor, share: float) -> Tensor:
    largest = values[..., -1:].clamp_min(torch.finfo(values.dtype).tiny)
    return values.maximum(share * largest)
