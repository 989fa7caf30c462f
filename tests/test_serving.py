"""Which engines take which widths, as their sources say."""

from __future__ import annotations

import pytest

from vdcompress import serving
from vdcompress.modeling.layout import LayerLayout, NopePart, Part, RotaryPart


def layer(k: int, v: int, groups: int = 8, v_groups: int | None = None) -> LayerLayout:
    rotary = RotaryPart(groups, 16, frequencies=tuple(range(8)))
    return LayerLayout(Part(v_groups or groups, v), NopePart(groups, k - 16), rotary)


def serves(*layers: LayerLayout) -> set[str]:
    return {verdict.backend for verdict in serving.verdicts(layers) if verdict.serves}


@pytest.mark.parametrize(
    ("k", "v", "takes", "refuses"),
    [
        (64, 40, {"FLASH_ATTN_DIFFKV", "TRITON_ATTN_DIFFKV"}, {"FLASH_ATTN", "CPU_ATTN"}),
        (128, 80, {"TRITON_ATTN_DIFFKV"}, {"FLASH_ATTN_DIFFKV"}),
        (40, 40, {"FLASH_ATTN", "TRITON_ATTN"}, {"CPU_ATTN", "FLASHINFER"}),
        (32, 32, {"FLASH_ATTN", "CPU_ATTN"}, {"FLASHINFER"}),
        (192, 192, {"FLASH_ATTN", "CPU_ATTN"}, {"TRITON_ATTN_DIFFKV"}),
        (64, 24, {"FLASH_ATTN_DIFFKV"}, {"TRITON_ATTN_DIFFKV"}),
    ],
)
def test_widths(k: int, v: int, takes: set[str], refuses: set[str]) -> None:
    found = serves(layer(k, v))
    assert takes <= found
    assert not refuses & found
    assert "generate()" in found
    assert "GGUF" not in found


def test_engines_want_one_layout_and_equal_groups() -> None:
    assert serves(layer(64, 40), layer(64, 48)) == {"generate()"}
    assert serves(layer(64, 40, groups=8, v_groups=1)) == {"generate()"}


def test_every_verdict_says_why() -> None:
    assert all(verdict.note for verdict in serving.verdicts([layer(64, 40)]))


def test_latents_are_replicated_beyond_their_groups() -> None:
    shared = [layer(192, 192, groups=1)]
    assert serving.tokens_per_gib(shared, 1) == serving.tokens_per_gib(shared, 8)
    heads = [layer(64, 40)]
    assert serving.tokens_per_gib(heads, 8) == 2**30 // (2 * (64 + 40))
