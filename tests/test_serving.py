"""Which engines take which widths, as their sources say."""

from __future__ import annotations

from dataclasses import replace

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


def test_ranks_keep_packed_latents_in_16_bits() -> None:
    exact = layer(64, 40)
    packed = replace(exact, v=replace(exact.v, bits=4, quantizer="per_token"))
    assert packed.packed
    assert serving.tokens_per_gib([packed], 1) == serving.tokens_per_gib([exact], 1)


def test_two_layouts_are_two_whatever_their_numbers() -> None:
    layers = [layer(64, 64, groups=64), layer(128, 128, groups=64)]
    by_backend = {verdict.backend: verdict for verdict in serving.verdicts(layers)}
    assert by_backend["TRITON_ATTN"].own_code
    assert not by_backend["triton, fa3, fa4"].serves


def test_keys_behind_rope_count_as_one_latent() -> None:
    nope = NopePart(2, 40, maps="per_head", after_rope=True)
    behind = LayerLayout(Part(2, 40), nope, RotaryPart(2, 0, maps="per_head"))
    assert {"FLASH_ATTN", "TRITON_ATTN", "generate()"} <= serves(behind)


@pytest.mark.parametrize(
    ("layers", "most"),
    [
        ([layer(64, 64, groups=8)], 8),
        ([layer(64, 64, groups=1)], None),
        ([layer(64, 64, groups=8, v_groups=2)], 2),
        ([LayerLayout(Part(8, 40, maps="per_head"), NopePart(8, 40), RotaryPart(8, 0))], 1),
        ([LayerLayout(Part(8, 40), NopePart(8, 40, maps="per_head"), RotaryPart(8, 0))], 1),
    ],
)
def test_tensor_parallelism_cuts_between_latents_only(
    layers: list[LayerLayout], most: int | None
) -> None:
    assert serving.ranks(layers) == most
    words = {None: "as many ranks as divide the heads", 1: "one rank"}.get(
        most, f"up to {most} ranks"
    )
    notes = [v.note for v in serving.verdicts(layers) if v.serves and v.engine.startswith("SGLang")]
    assert all(words in note for note in notes)


def test_what_vllm_refuses_with_the_plugin_it_says() -> None:
    assert not serving.vllm_problems([layer(64, 40)])
    assert not serving.vllm_problems([layer(64, 64), layer(40, 40)])
    [uneven] = serving.vllm_problems([layer(64, 64, groups=8, v_groups=1)])
    assert "8 and 1" in uneven
    [differ] = serving.vllm_problems([layer(64, 40), layer(64, 48)])
    assert "all layers have to be alike" in differ
    rotary = RotaryPart(8, 16, frequencies=tuple(range(8)))
    packed = LayerLayout(Part(8, 64, bits=8, quantizer="x"), NopePart(8, 48), rotary)
    [bits] = serving.vllm_problems([packed])
    assert "--kv-cache-dtype" in bits


def test_low_bit_caches_go_with_equal_widths() -> None:
    low = {"int8_per_token_head", "int4_per_token_head"}
    equal = {v.backend: v for v in serving.verdicts([layer(192, 192, groups=1)])}
    assert low <= set(equal["TRITON_ATTN"].cache_dtypes)
    assert "fp8" in equal["CPU_ATTN"].cache_dtypes
    unequal = {v.backend: v for v in serving.verdicts([layer(64, 40)])}
    assert all(not low & set(verdict.cache_dtypes) for verdict in unequal.values())
    assert "int8 and int4 caches want K = V" in unequal["TRITON_ATTN_DIFFKV"].note


@pytest.mark.parametrize(
    ("k", "v", "version", "blackwell", "takes"),
    [
        (64, 40, 3, False, True),
        (64, 64, 3, False, True),
        (128, 80, 3, False, False),
        (192, 128, 3, False, True),
        (192, 96, 3, False, False),
        (40, 64, 3, False, False),
        (64, 40, 2, False, False),
        (128, 80, 4, False, True),
        (192, 128, 4, True, False),
        (64, 36, 4, False, False),
    ],
)
def test_flash_attention_kernels(
    k: int, v: int, version: int, blackwell: bool, takes: bool
) -> None:
    assert serving.flash_takes_unequal(k, v, version, blackwell) is takes


def test_widths_that_the_main_backend_takes() -> None:
    assert [width for width in (8, 40, 192, 256, 264, 20) if serving.common(width)] == [
        8,
        40,
        192,
        256,
    ]
