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


def test_two_layouts_are_two_whatever_their_numbers() -> None:
    assert "TRITON_ATTN" not in serves(layer(64, 64, groups=64), layer(128, 128, groups=64))


def test_keys_behind_rope_count_as_one_latent() -> None:
    nope = NopePart(2, 40, maps="per_head", after_rope=True)
    behind = LayerLayout(Part(2, 40), nope, RotaryPart(2, 0, maps="per_head"))
    assert {"FLASH_ATTN", "TRITON_ATTN", "generate()"} <= serves(behind)


@pytest.mark.parametrize(
    ("layers", "most"),
    [
        ([layer(64, 64, groups=8)], 8),
        ([layer(64, 64, groups=1)], 1),
        ([layer(64, 64, groups=8, v_groups=2)], 2),
        ([LayerLayout(Part(8, 40, maps="per_head"), NopePart(8, 40), RotaryPart(8, 0))], 1),
        ([LayerLayout(Part(8, 40), NopePart(8, 40, maps="per_head"), RotaryPart(8, 0))], 1),
    ],
)
def test_tensor_parallelism_cuts_between_latents_only(layers: list[LayerLayout], most: int) -> None:
    assert serving.ranks(layers) == most
    notes = [v.note for v in serving.verdicts(layers) if v.serves and v.engine.startswith("SGLang")]
    assert all((f"up to {most} ranks" if most > 1 else "one rank") in note for note in notes)


def test_widths_that_the_main_backend_takes() -> None:
    assert [width for width in (8, 40, 192, 256, 264, 20) if serving.common(width)] == [
        8,
        40,
        192,
        256,
    ]
