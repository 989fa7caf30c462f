"""Products of few rows with many tokens, and the attention of one query on a CPU."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vdcompress.modeling import thin_products
from vdcompress.modeling.attention import latent_attention, matmul_attention
from vdcompress.modeling.cache import GrowingLayer
from vdcompress.modeling.thin_products import FEW, add_sums, dots, sums


@pytest.mark.parametrize("latents", [1, 3])
@pytest.mark.parametrize("rows", [1, 8, FEW + 1])
@pytest.mark.parametrize("tokens", [5, 2048, 5000])
def test_products_of_few_rows(latents: int, rows: int, tokens: int) -> None:
    x, query = torch.randn(latents, tokens, 24), torch.randn(latents, rows, 24)
    weights = torch.rand(latents, rows, tokens) / tokens
    expected = (weights.double() @ x.double()).float()
    torch.testing.assert_close(dots(query, x), query @ x.mT, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sums(weights, x), expected, rtol=1e-4, atol=1e-5)
    total = torch.ones(latents, rows, 24)
    add_sums(total, weights, x)
    torch.testing.assert_close(total, expected + 1, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("tokens", [250, 500])
@pytest.mark.parametrize("first", [0, 30])
@pytest.mark.parametrize("tiles", [True, False])
def test_half_precision_with_room_between_latents(
    rows: int, tokens: int, first: int, tiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(thin_products, "multiplies_tiles", lambda: tiles)
    room = torch.full((3, tokens, 24), torch.nan).bfloat16()
    room[:, first : first + 200] = torch.randn(3, 200, 24)
    x, query = room[:, first : first + 200], torch.randn(3, rows, 24).bfloat16()
    weights = torch.rand(3, rows, 200).bfloat16() / 200
    close = {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(dots(query, x).float(), query.float() @ x.float().mT, **close)
    torch.testing.assert_close(sums(weights, x).float(), weights.float() @ x.float(), **close)


@pytest.mark.parametrize(("g", "k", "v"), [(4, 40, 40), (4, 64, 40), (4, 24, 40), (1, 96, 96)])
@pytest.mark.parametrize("masked", [False, True])
def test_one_query_in_half_precision(g: int, k: int, v: int, masked: bool) -> None:
    cache, tokens = GrowingLayer(), 300
    for new in (tokens - 1, 1):
        found = cache.update(*(torch.randn(2, g, new, w).bfloat16() for w in (k, v)))
    query, module = torch.randn(2, 4, 1, k).bfloat16(), nn.Module().eval()
    mask = (torch.arange(tokens) > 17).expand(2, 1, 1, -1) if masked else None
    exact = [x.double() for x in (query, *found)]
    expected, _ = matmul_attention(module, *exact, mask, scaling=0.125)
    output, _ = latent_attention(module, query, *found, mask, scaling=0.125)
    torch.testing.assert_close(output.double(), expected, rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize(("tokens", "first"), [(250, 0), (500, 0), (250, 30)])
def test_latents_are_read_with_their_room_or_where_they_lie(
    tokens: int, first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(thin_products, "multiplies_tiles", lambda: True)
    x = torch.randn(3, tokens, 24).bfloat16()[:, first : first + 200]
    whole = thin_products._with_room(x)
    if (tokens, first) == (250, 0):
        assert whole is not None
        assert (whole.shape, whole.data_ptr()) == ((3, 250, 24), x.data_ptr())
    else:
        assert whole is None
