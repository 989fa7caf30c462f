"""A model cut by heads and latents, rank by rank, adds up to the whole: what engines rely on."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch

import vdcompress as vd
from vdcompress import families
from vdcompress.gains import gains
from vdcompress.load import Base
from vdcompress.statistics import Statistics
from vdcompress.vllm_plugin.share import Share

MAPS = {"q_expand": "heads", "o_contract": "heads", "k_compress": "groups"}
ROWS = {"q_proj": "heads", "k_proj": "groups", "v_compress": "groups"}


def attention(base: Base, statistics: Statistics, **asked: int) -> Any:
    """Return the first attention module of a compressed model."""
    found = gains(base.shape, statistics)
    plan = vd.plan_for(base.shape, vd.Request.of(**asked), gains=found)
    model = vd.rewrite(base, plan, statistics)
    return families.get(base.shape.family).attention_modules(model)[0]


def piece(module: Any, output: str, rank: int, ranks: int) -> Any:
    """Return what one rank holds of an attention module."""
    shares = {
        "heads": Share.of(module.config.num_attention_heads, rank, ranks),
        "groups": Share.of(module.layout.k_groups, rank, ranks),
    }
    cut = deepcopy(module)
    for name, of in (ROWS | MAPS).items():
        if (part := getattr(cut, name)) is not None:
            for parameter in part.parameters():
                parameter.data = shares[of].rows(parameter.data)
    projection = getattr(cut, output)
    projection.weight.data = shares["heads"].rows(projection.weight.data.T).T
    projection.bias.data = projection.bias.data / ranks
    return cut


def attended(module: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Run an attention module causally, without a cache."""
    t = hidden.shape[1]
    angles = torch.arange(t)[None, :, None] * torch.tensor(module.config.inv_freq)
    mask = torch.ones(t, t, dtype=torch.bool).tril()[None, None]
    embeddings = (angles.cos(), angles.sin())
    with torch.inference_mode():
        return module(hidden, attention_mask=mask, position_embeddings=embeddings)[0]


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize(
    "asked",
    [{"v_dim": 16}, {"v_dim": 24, "k_dim": 24, "groups": 1}, {"v_dim": 32, "groups": 2}],
    ids=["per head", "one latent", "two latents"],
)
def test_ranks_add_up(
    base: Base, statistics: Statistics, asked: dict[str, int], ranks: int
) -> None:
    if asked.get("groups") == 2:
        asked = asked | {"k_dim": 32}
    module = attention(base, statistics, **asked)
    module.config._attn_implementation = "eager"
    hidden = torch.randn(2, 9, base.shape.hidden, generator=torch.Generator().manual_seed(0))
    whole = attended(module, hidden)
    output = families.get(base.shape.family).output_name
    parts = sum(attended(piece(module, output, rank, ranks), hidden) for rank in range(ranks))
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-4)


def test_the_plan_keeps_a_single_latent_whole(base: Base, statistics: Statistics) -> None:
    several, single = (
        attention(base, statistics, v_dim=32, k_dim=32, groups=groups).config.base_model_tp_plan
        for groups in (2, 1)
    )
    latents = {name for name in several if name.endswith(("k_proj", "v_compress"))}
    assert len(latents) == 2
    assert set(several) - set(single) == latents


def test_maps_that_are_not_cut_say_so(base: Base, statistics: Statistics) -> None:
    module = attention(base, statistics, v_dim=24, k_dim=24, groups=1)
    assert module.o_contract is not None
    with pytest.raises(ValueError, match="tensor parallelism does not cut maps per head"):
        module.o_contract(torch.zeros(1, 2, 3, 24))


def test_vllm_without_the_plugin_does_not_pad_v_in_silence(
    base: Base, statistics: Statistics
) -> None:
    hidden = torch.zeros(1, 3, base.shape.hidden)
    for asked, refused in (({"v_dim": 16}, True), ({"v_dim": base.shape.kv_dim}, False)):
        module = attention(base, statistics, **asked)
        embeddings = (torch.ones(1, 3, len(module.config.inv_freq)),) * 2
        module.config._attn_implementation = "vllm"
        if refused:
            with pytest.raises(ValueError, match="pip install vdcompress"):
                module.latents(hidden, embeddings)
        else:
            module.latents(hidden, embeddings)
