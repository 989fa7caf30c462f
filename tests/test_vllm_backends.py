"""Which backend of vLLM takes a pair of widths, on platforms that are not here."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from test_serving import layer
from vllm_runs import why_not

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(bool(why_not()), reason=why_not()),
]


class Kernels:
    """A backend that remembers how wide V is."""

    supported_kv_cache_dtypes = ("auto", "bfloat16", "fp8")

    def __init__(self, name: str) -> None:
        self.name, self.width = name, 0

    def get_name(self) -> str:
        return self.name

    def set_head_size_v(self, width: int) -> None:
        self.width = width

    def is_supported_on_current_device(self, k: int, v: int, has_sinks: bool) -> bool:
        return True  # as vLLM's own answer, which looks at the version alone


def engine(cache: str = "auto", named: Any = None) -> Any:
    return SimpleNamespace(
        attention_config=SimpleNamespace(backend=named),
        cache_config=SimpleNamespace(cache_dtype=cache),
    )


@pytest.fixture
def platform(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that pretends to be on a GPU with some version of FlashAttention."""
    from vllm.v1.attention.backends import fa_utils

    from vdcompress.vllm_plugin import backends

    monkeypatch.setattr(backends, "_class", Kernels)

    def pretend(version: int | None, *, cuda: bool = True, blackwell: bool = False) -> Any:
        found = SimpleNamespace(
            is_cuda=lambda: cuda,
            is_cuda_alike=lambda: True,
            has_device_capability=lambda _level: blackwell,
            device_name="pretended",
        )
        monkeypatch.setattr(backends, "current_platform", found)
        monkeypatch.setattr(fa_utils, "get_flash_attn_version", lambda **_: version)
        return backends.backend_for

    return pretend


@pytest.mark.parametrize(
    ("k", "v", "version", "blackwell", "name"),
    [
        (64, 40, 3, False, "FLASH_ATTN_DIFFKV"),
        (128, 80, 3, False, "TRITON_ATTN_DIFFKV"),  # vLLM would call a kernel that refuses it
        (128, 80, 4, False, "FLASH_ATTN_DIFFKV"),
        (192, 128, 4, True, "TRITON_ATTN_DIFFKV"),
        (40, 64, 3, False, "TRITON_ATTN_DIFFKV"),
        (64, 40, 2, False, "TRITON_ATTN_DIFFKV"),
    ],
)
def test_unequal_widths(
    platform: Any, k: int, v: int, version: int, blackwell: bool, name: str
) -> None:
    found = platform(version, blackwell=blackwell)(layer(k, v), engine())
    assert (found.name, found.width) == (name, v)


def test_equal_widths_are_left_to_vllm(platform: Any) -> None:
    assert platform(3)(layer(64, 64), engine()) is None
    assert platform(3)(layer(40, 40), engine("int8_per_token_head")) is None


def test_rocm_and_low_bit_caches_take_triton(platform: Any) -> None:
    assert platform(None, cuda=False)(layer(64, 40), engine()).name == "TRITON_ATTN_DIFFKV"
    assert platform(3)(layer(64, 40), engine("fp8")).name == "TRITON_ATTN_DIFFKV"
    with pytest.raises(ValueError, match="has no --kv-cache-dtype int4_per_token_head"):
        platform(3)(layer(64, 40), engine("int4_per_token_head"))


def test_a_backend_that_pads_is_never_taken(platform: Any) -> None:
    named = SimpleNamespace(name="FLASH_ATTN", get_class=object)
    with pytest.raises(ValueError, match="FLASH_ATTN keeps K and V equally wide, here they are 64"):
        platform(3)(layer(64, 40), engine(named=named))


def test_vllm_still_has_what_is_asked_of_its_backends() -> None:
    """The names and hooks that the plugin uses exist in this version."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from vdcompress.vllm_plugin.backends import FLASH, TRITON

    for name in (FLASH, TRITON):
        path = AttentionBackendEnum[name].get_path()
        assert path.startswith("vllm.v1.attention.backends.")
