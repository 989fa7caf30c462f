"""Rotary keys shared by heads: complex mixing within each frequency (DESIGN 3.4).

RoPE multiplies the pair (x, y) of every head, read as z = x + i y, by the same e^(i angle) at one
position and frequency. A complex-linear map over the heads of one frequency therefore commutes with
it: virtual heads c = E z are turned as their heads would have been, and the query side multiplies
by the conjugate, Re(conj(q) D c) = Re(conj(D^H q) c). Keys are not centred here: a constant is not
one behind RoPE.

The moments are those behind RoPE, where a common phase drops out of E[z_h conj(z_h')].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vdcompress.latents.lowrank import best_encoder, regression_decoder
from vdcompress.latents.lowrank import gains as lowrank_gains

if TYPE_CHECKING:
    from vdcompress.latents.keys import KeyMetric


@dataclass(frozen=True)
class Pairs:
    """The complex maps of one layer.

    Attributes:
        frequencies: index of each kept pair's frequency, ascending, [P].
        encoder: E, complex, [g, P, m] over the m heads of a latent.
        decoder: D, complex, [g, m, P].
    """

    frequencies: tuple[int, ...]
    encoder: Tensor
    decoder: Tensor


def solve(metric: KeyMetric, frequencies: tuple[int, ...], rotary_dim: int, joined: int) -> Pairs:
    """Keep the best virtual heads of each frequency.

    Args:
        metric: of the whole stacked keys.
        frequencies: index of each kept pair, ascending; one that stands m times keeps m heads.
        rotary_dim: rotated dimensions of a head.
        joined: heads per latent.
    """
    reading, spread = complex_moments(metric, rotary_dim, joined)
    encoders, decoders = [], []
    for index in sorted(set(frequencies)):
        width = frequencies.count(index)
        encoder = best_encoder(reading[:, index], spread[:, index], width)
        encoders.append(encoder)
        decoders.append(regression_decoder(encoder, spread[:, index]))
    if not encoders:
        empty = reading.new_zeros(len(reading), 0, joined)
        return Pairs((), empty, empty.mT)
    return Pairs(frequencies, torch.cat(encoders, dim=1), torch.cat(decoders, dim=2))


def gains(metric: KeyMetric, rotary_dim: int, joined: int) -> Tensor:
    """Return what each further virtual head of a frequency saves, falling, [g, F, m].

    A real error's expected square is half of the complex one's: its phase is even over positions.
    """
    reading, spread = complex_moments(metric, rotary_dim, joined)
    return lowrank_gains(reading, spread) / 2


def complex_moments(metric: KeyMetric, rotary_dim: int, joined: int) -> tuple[Tensor, Tensor]:
    """Return M and E[z z^H] of the heads of a latent at each frequency, complex [g, F, m, m]."""
    return (
        _by_frequency(metric.reading, rotary_dim, joined),
        _by_frequency(metric.keys.second, rotary_dim, joined),
    )


def _by_frequency(moments: Tensor, rotary_dim: int, joined: int) -> Tensor:
    """E[z_h conj(z_h')] = E[x x' + y y'] + i E[y x' - x y'] from real moments [g, n, n]."""
    count = rotary_dim // 2
    heads = moments.unflatten(-1, (joined, -1)).unflatten(-3, (joined, -1))
    first, second = slice(0, count), slice(count, rotary_dim)

    def diagonal(rows: slice, columns: slice) -> Tensor:
        block = heads[:, :, rows][..., columns]  # [g, m, F, m, F]
        return torch.diagonal(block, dim1=2, dim2=4).permute(0, 3, 1, 2)

    real = diagonal(first, first) + diagonal(second, second)
    return torch.complex(real, diagonal(second, first) - diagonal(first, second))


def write(
    weight: Tensor, bias: Tensor, pairs: Pairs, rotary_dim: int, groups: int
) -> tuple[Tensor, Tensor]:
    """Return the rows that write the virtual heads: weight [g, 2 P, hidden] and bias [g, 2 P].

    Args:
        weight: of the keys, [G, d, hidden].
        bias: [G, d].
        pairs: the maps.
        rotary_dim: rotated dimensions of a head.
        groups: g.
    """
    turned = []
    for rows in (weight, bias.unsqueeze(-1)):
        z = complex_rows(rows, pairs.frequencies, rotary_dim).unflatten(0, (groups, -1))
        mixed = torch.einsum("gpm,gmpx->gpx", pairs.encoder, z)
        turned.append(torch.cat((mixed.real, mixed.imag), dim=1))
    return turned[0], turned[1].squeeze(-1)


def read(
    weight: Tensor, bias: Tensor, pairs: Pairs, rotary_dim: int, sharing: int
) -> tuple[Tensor, Tensor]:
    """Return the rows that turn queries to the virtual heads: [H, 2 P, hidden] and [H, 2 P].

    Args:
        weight: of the queries, [H, d, hidden].
        bias: [H, d].
        pairs: the maps.
        rotary_dim: rotated dimensions of a head.
        sharing: query heads per key/value head.
    """
    conjugate = pairs.decoder.conj().flatten(0, 1).repeat_interleave(sharing, dim=0)
    turned = []
    for rows in (weight, bias.unsqueeze(-1)):
        z = complex_rows(rows, pairs.frequencies, rotary_dim) * conjugate.unsqueeze(-1)
        turned.append(torch.cat((z.real, z.imag), dim=1))
    return turned[0], turned[1].squeeze(-1)


def complex_rows(rows: Tensor, frequencies: tuple[int, ...], rotary_dim: int) -> Tensor:
    """Return [heads, d, x] as the pairs of some frequencies as complex numbers [heads, P, x]."""
    count = rotary_dim // 2
    z = torch.complex(rows[:, :count], rows[:, count:rotary_dim])
    return z[:, list(frequencies)]
