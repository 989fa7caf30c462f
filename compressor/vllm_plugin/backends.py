"""Which attention backend of vLLM runs latents whose K and V differ in width."""

from __future__ import annotations

from typing import Any

from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from vdcompress import serving
from vdcompress.modeling.layout import LayerLayout

FLASH, TRITON = "FLASH_ATTN_DIFFKV", "TRITON_ATTN_DIFFKV"
PLAIN = ("auto", "bfloat16", "float16")


def backend_for(layout: LayerLayout, vllm_config: VllmConfig) -> Any:
    """Return the backend class for a layer, None to leave the choice to vLLM.

    Equal widths are vLLM's to choose. Otherwise a backend that keeps V at its own width is
    wanted: what the user names, else FlashAttention where its kernels take the pair, else Triton.

    Raises:
        ValueError: none here does, or the one that is named does not.
    """
    k, v = layout.k_head_dim, layout.v_head_dim
    named = vllm_config.attention_config.backend
    if named is not None and hasattr(named.get_class(), "set_head_size_v"):
        backend: Any = named.get_class()
    elif k == v:
        return None
    elif named is None:
        backend = _class(_choice(k, v, vllm_config))
    else:
        raise ValueError(
            f"{named.name} keeps K and V equally wide, here they are {k} and {v}: leave the choice "
            f"to vdcompress, or name {TRITON}"
        )
    dtype = vllm_config.cache_config.cache_dtype
    if dtype not in PLAIN and dtype not in backend.supported_kv_cache_dtypes:
        raise ValueError(
            f"{backend.get_name()} has no --kv-cache-dtype {dtype} where K and V differ in width "
            f"({k} and {v}); a model with K = V takes it"
        )
    backend.set_head_size_v(v)
    return backend


def _choice(k: int, v: int, vllm_config: VllmConfig) -> str:
    """Return the name of the backend for unequal widths on this platform."""
    if current_platform.is_cuda() and _flash_takes(k, v, vllm_config):
        return FLASH
    if current_platform.is_cuda_alike():
        return TRITON
    raise ValueError(
        f"vLLM has no backend for K and V of unequal widths ({k} and {v}) on "
        f"{current_platform.device_name}; make them equal: vdcompress apply ... --for vllm"
    )


def _flash_takes(k: int, v: int, vllm_config: VllmConfig) -> bool:
    """Say whether this device's FlashAttention has a kernel for the pair.

    vLLM's own check looks at the version alone, and FlashAttention 3 refuses some pairs when it is
    called.
    """
    if vllm_config.cache_config.cache_dtype not in PLAIN:
        return False
    if not _class(FLASH).is_supported_on_current_device(k, v, False):
        return False
    from vllm.v1.attention.backends.fa_utils import get_flash_attn_version

    version = get_flash_attn_version(head_size=k, head_size_v=v)
    blackwell = current_platform.has_device_capability(100)
    return version is not None and serving.flash_takes_unequal(k, v, version, blackwell)


def _class(name: str) -> Any:
    return AttentionBackendEnum[name].get_class()
