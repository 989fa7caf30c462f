"""The basis of latents that are rounded, against random bases and the bound that it reaches."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vdcompress.latents import lowrank
from vdcompress.latents.balance import balance, rounding_loss

R = 12


def positive(seed: int, dtype: torch.dtype = torch.float64, n: int = R) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3 * n, dtype=dtype, generator=generator)
    scales = torch.logspace(0, -0.5, n, dtype=torch.float64)
    return (x @ x.mH) * scales.unsqueeze(-1) * scales


def damage(spread: Tensor, reading: Tensor, basis: Tensor) -> float:
    """Return tr(T C T^H) tr(T^(-H) W T^(-1)) / r, written out."""
    back = torch.linalg.inv(basis)
    kept = torch.trace(basis @ spread @ basis.mH)
    read = torch.trace(back.mH @ reading @ back)
    return float((kept * read).real) / len(basis)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_both_sides_become_the_singular_values(dtype: torch.dtype) -> None:
    spread, reading = positive(0, dtype), positive(1, dtype).flip(0, 1)
    basis, back = balance(spread, reading)

    singular = lowrank.gains(reading, spread).sqrt().sort().values.to(dtype)
    torch.testing.assert_close(basis @ back, torch.eye(R, dtype=dtype))
    torch.testing.assert_close(basis @ spread @ basis.mH, torch.diag(singular))
    torch.testing.assert_close(back.mH @ reading @ back, torch.diag(singular))


def test_no_other_basis_loses_less() -> None:
    spread, reading = positive(2), positive(3)
    basis, _ = balance(spread, reading)
    least = damage(spread, reading, basis)

    whitened = torch.linalg.inv(torch.linalg.cholesky(spread))
    generator = torch.Generator().manual_seed(4)
    near = [
        basis + 0.05 * torch.randn(R, R, dtype=torch.float64, generator=generator)
        for _ in range(20)
    ]
    for other in (torch.eye(R, dtype=torch.float64), whitened, *near):
        assert damage(spread, reading, other) > least * (1 - 1e-12)


def test_the_loss_of_each_width_is_that_of_its_balanced_latent() -> None:
    reading, spread = positive(5), positive(6)
    losses = rounding_loss(lowrank.gains(reading, spread).sqrt())

    for width in (1, 5, R):
        encoder = lowrank.best_encoder(reading, spread, width)
        decoder = lowrank.regression_decoder(encoder, spread)
        within, read = encoder @ spread @ encoder.mT, decoder.mT @ reading @ decoder
        basis, _ = balance(within, read)
        assert damage(within, read, basis) == pytest.approx(float(losses[width - 1]), rel=1e-8)


def test_directions_without_variance_leave_the_basis_finite() -> None:
    spread, reading = torch.diag(torch.tensor([1.0, 0.5, 0.0])).double(), positive(7, n=3)
    basis, back = balance(spread, reading)

    torch.testing.assert_close(basis @ back, torch.eye(3, dtype=torch.float64))
    assert basis.abs().max() < 1e6


def test_rounding_loses_what_is_predicted() -> None:
    """Noise with one variance for all numbers, its expected damage by sampling."""
    reading, spread = positive(8), positive(9)
    basis, back = balance(spread, reading)
    generator = torch.Generator().manual_seed(10)
    z = torch.randn(200_000, R, dtype=torch.float64, generator=generator)
    z = z @ (basis @ torch.linalg.cholesky(spread)).mT
    error = torch.randn(z.shape, dtype=torch.float64, generator=generator)
    error = error * (0.01 * z.square().mean()).sqrt()
    seen = error @ back.mT
    measured = torch.einsum("ni,ij,nj->n", seen, reading, seen).mean()

    expected = 0.01 * rounding_loss(lowrank.gains(reading, spread).sqrt())[-1]
    assert float(measured) == pytest.approx(float(expected), rel=0.02)
