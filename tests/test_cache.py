"""The growing cache beside plain concatenation, past several of its blocks."""

from __future__ import annotations

import pytest
import torch

from vdcompress.modeling.cache import LatentCache
from vdcompress.modeling.room import BLOCK, GROWTH


@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_it_holds_what_concatenation_holds(chunk: int) -> None:
    keys, values = torch.randn(2, 3, 4 * BLOCK + 5, 8), torch.randn(2, 3, 4 * BLOCK + 5, 5)
    cache = LatentCache(1)
    seen = 0
    for k, v in zip(keys.split(chunk, dim=2), values.split(chunk, dim=2), strict=True):
        seen += k.shape[2]
        held = cache.update(k, v, 0)
        assert torch.equal(held[0], keys[:, :, :seen])
        assert torch.equal(held[1], values[:, :, :seen])
        per_token = 2 * 3 * (8 + 5) * 4
        assert cache.nbytes() == seen * per_token
        assert cache.nbytes_allocated() <= (GROWTH * seen + BLOCK) * per_token
