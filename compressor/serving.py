"""Which engines serve which widths: facts read in their sources, as data.

Each entry says what one engine's attention backend takes, for the versions named. K and V are the
widths of one latent. Nothing here imports an engine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from vdcompress.modeling.layout import TYPICAL_TOKENS, LayerLayout

FLASHINFER_WIDTHS = (64, 128, 256, 512)
CPU_WIDTHS = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
RANKS = (1, 2, 4, 8)
GIB = 2**30


@dataclass(frozen=True)
class Backend:
    """What one attention backend takes.

    Attributes:
        engine: name and version.
        backend: its attention backend.
        takes: says whether it runs latents of widths (K, V).
        needs: what has to be installed or set for it when widths are equal.
        needs_unequal: the same when they differ.
        rule: which widths, in words.
    """

    engine: str
    backend: str
    takes: Callable[[int, int], bool]
    needs: str
    needs_unequal: str
    rule: str


@dataclass(frozen=True)
class Verdict:
    """Whether one backend serves a model, and what for it takes or why not."""

    engine: str
    backend: str
    serves: bool
    note: str


def _flash(k: int, v: int) -> bool:
    return k == v and k % 8 == 0 and k <= 256


def _flash_unequal(k: int, v: int) -> bool:
    """FlashAttention 3 on Hopper; FlashAttention 4 takes more."""
    return k % 8 == 0 and v % 8 == 0 and v <= k and (k <= 64 or (128 < k <= 192 and 96 < v <= 128))


REMOTE = "trust_remote_code"
PLUGIN = "a plugin with an own attention class"
BACKENDS: tuple[Backend, ...] = (
    Backend(
        "transformers >= 5.17",
        "generate()",
        lambda *_widths: True,
        "nothing else",
        "nothing else",
        "takes any widths",
    ),
    Backend(
        "transformers >= 5.17",
        "continuous batching",
        lambda k, v: k == v,
        "nothing else",
        "",
        "takes K = V",
    ),
    Backend(
        "vLLM 0.33",
        "FLASH_ATTN",
        _flash,
        REMOTE,
        "",
        "takes K = V, a multiple of 8 up to 256",
    ),
    Backend(
        "vLLM 0.33",
        "FLASH_ATTN_DIFFKV",
        lambda k, v: k != v and _flash_unequal(k, v),
        "",
        f"{PLUGIN}; Hopper",
        "takes K <= 64 and V < K, or K 129-192 with V 97-128, multiples of 8",
    ),
    Backend(
        "vLLM 0.33",
        "TRITON_ATTN",
        lambda k, v: k == v and k >= 32,
        f"{REMOTE}; takes int8 and int4 caches",
        "",
        "takes K = V from 32 on",
    ),
    Backend(
        "vLLM 0.33",
        "TRITON_ATTN_DIFFKV",
        lambda k, v: k != v and min(k, v) >= 32,
        "",
        PLUGIN,
        "takes K != V, both from 32 on",
    ),
    Backend(
        "vLLM 0.33",
        "FLASHINFER",
        lambda k, v: k == v and k in FLASHINFER_WIDTHS,
        REMOTE,
        "",
        f"takes K = V in {', '.join(map(str, FLASHINFER_WIDTHS))}",
    ),
    Backend(
        "vLLM 0.33",
        "CPU_ATTN",
        lambda k, v: k == v and k in CPU_WIDTHS,
        REMOTE,
        "",
        f"takes K = V in {', '.join(map(str, CPU_WIDTHS))}",
    ),
    Backend(
        "SGLang 0.5.23",
        "triton, fa3, fa4",
        lambda *_widths: True,
        "its Transformers backend; not tried",
        "an own model class; not tried",
        "takes any widths",
    ),
    Backend(
        "llama.cpp",
        "GGUF",
        lambda *_widths: False,
        "",
        "",
        "has no architecture for compressed models",
    ),
)


def verdicts(layers: Sequence[LayerLayout]) -> tuple[Verdict, ...]:
    """Say for every backend whether it serves these layers.

    Args:
        layers: the layouts of all layers of a model.
    """
    return tuple(_verdict(backend, layers) for backend in BACKENDS)


def ranks(layers: Sequence[LayerLayout]) -> int:
    """Return over how many ranks tensor parallelism can cut these layers.

    The projections that write latents are cut between latents, never within one, and maps per
    head (of a shared V, or of keys behind RoPE) are not cut at all.
    """
    if any("per_head" in (layer.k_maps, layer.v.maps) for layer in layers):
        return 1
    return math.gcd(*(groups for layer in layers for groups in (layer.k_groups, layer.v_groups)))


def common(width: int) -> bool:
    """Say whether vLLM's main GPU backend takes latents of K and V that are this wide."""
    return _flash(width, width)


def tokens_per_gib(layers: Sequence[LayerLayout], ranks: int) -> int:
    """Return how many tokens a GiB of each rank's memory holds under tensor parallelism.

    A latent is never cut: with more ranks than groups each rank keeps one, replicated.
    """
    per_rank = sum(
        replace(part, groups=-(-part.groups // ranks)).cache_bytes(TYPICAL_TOKENS)
        for layer in layers
        for part in layer.parts
    )
    return GIB * TYPICAL_TOKENS // per_rank


def _verdict(backend: Backend, layers: Sequence[LayerLayout]) -> Verdict:
    widths = {(layer.k_head_dim, layer.v_head_dim) for layer in layers}
    groups = {(layer.k_groups, layer.v_groups) for layer in layers}
    own = backend.engine.startswith("transformers") and backend.backend == "generate()"
    if not all(backend.takes(k, v) for k, v in widths):
        return Verdict(backend.engine, backend.backend, False, backend.rule)
    if not own and any(k != v for k, v in groups):
        note = "takes as many K latents as V latents only"
        return Verdict(backend.engine, backend.backend, False, note)
    if not own and max(len(widths), len(groups)) > 1:
        note = "takes one layout for all layers only"
        return Verdict(backend.engine, backend.backend, False, note)
    unequal = any(k != v for k, v in widths)
    note = f"needs {backend.needs_unequal if unequal else backend.needs}"
    if not backend.engine.startswith("transformers"):
        most = ranks(layers)
        note += f"; up to {most} ranks" if most > 1 else "; one rank"
    if not own and any(layer.packed for layer in layers):
        note += "; keeps packed latents in 16 bits"
    return Verdict(backend.engine, backend.backend, True, note)
