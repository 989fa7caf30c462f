"""Which engines serve which layouts: facts read in their sources, as data.

Each entry says what one engine's attention backend takes, for the versions named. K and V are the
widths of one latent. Nothing here imports an engine; ``bench/results/vllm-cpu-*.json`` say what was
run.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

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
        cache_dtypes: which ``--kv-cache-dtype`` of the engine it has, beside the model's own.
    """

    engine: str
    backend: str
    takes: Callable[[int, int], bool]
    needs: str
    needs_unequal: str
    rule: str
    cache_dtypes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """Whether one backend serves a model, and what for it takes or why not.

    Attributes:
        engine: name and version.
        backend: its attention backend.
        serves: whether it does.
        note: what it needs, or why it does not.
        own_code: whether code beyond the exported folder has to be installed for it.
        cache_dtypes: which low-bit caches of the engine go with it.
    """

    engine: str
    backend: str
    serves: bool
    note: str
    own_code: bool = False
    cache_dtypes: tuple[str, ...] = ()


def flash_takes_unequal(k: int, v: int, version: int, blackwell: bool = False) -> bool:
    """Say whether FlashAttention has a kernel for latents of unequal widths K and V.

    Version 3 (Hopper) takes what its ``flash_api.cpp`` lists; version 4 multiples of 8 up to 256,
    on Blackwell up to 128. vLLM's cache hands it V behind K in one row, so V is not wider than K.
    """
    if k % 8 or v % 8 or v > k:
        return False
    if version == 3:
        return k <= 64 or (128 < k <= 192 and 96 < v <= 128)
    return version == 4 and min(k, v) >= 8 and k <= (128 if blackwell else 256)


def _flash(k: int, v: int) -> bool:
    return k == v and k % 8 == 0 and k <= 256


VLLM = "vLLM 0.32-0.33"
REMOTE = "--trust-remote-code, or vdcompress's plugin instead"
PLUGIN = "vdcompress's plugin: pip install vdcompress beside vLLM"
FP8 = ("fp8",)
PER_TOKEN_HEAD = ("int8_per_token_head", "int4_per_token_head")
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
        VLLM,
        "FLASH_ATTN",
        _flash,
        REMOTE,
        "",
        "takes K = V, a multiple of 8 up to 256",
        FP8,
    ),
    Backend(
        VLLM,
        "FLASH_ATTN_DIFFKV",
        lambda k, v: k != v and flash_takes_unequal(k, v, 3),
        "",
        f"{PLUGIN}; Hopper; low-bit caches go to Triton",
        "takes K <= 64 and V < K, or K 129-192 with V 97-128, multiples of 8",
    ),
    Backend(
        VLLM,
        "TRITON_ATTN",
        lambda k, v: k == v and k >= 32,
        REMOTE,
        "",
        "takes K = V from 32 on",
        FP8 + PER_TOKEN_HEAD,
    ),
    Backend(
        VLLM,
        "TRITON_ATTN_DIFFKV",
        lambda k, v: k != v and min(k, v) >= 32,
        "",
        f"{PLUGIN}; int8 and int4 caches want K = V",
        "takes K != V, both from 32 on",
        FP8,
    ),
    Backend(
        VLLM,
        "FLASHINFER",
        lambda k, v: k == v and k in FLASHINFER_WIDTHS,
        REMOTE,
        "",
        f"takes K = V in {', '.join(map(str, FLASHINFER_WIDTHS))}",
        FP8,
    ),
    Backend(
        VLLM,
        "CPU_ATTN",
        lambda k, v: k == v and k in CPU_WIDTHS,
        REMOTE,
        "",
        f"takes K = V in {', '.join(map(str, CPU_WIDTHS))}",
        FP8,
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


def to_json(found: Sequence[Verdict]) -> list[dict[str, Any]]:
    """Return verdicts as plain values."""
    return [asdict(verdict) for verdict in found]


def vllm_commands(found: Sequence[Verdict], folder: str) -> list[str]:
    """Return what to type to serve a folder with vLLM, nothing if no backend of it does.

    Args:
        found: the model's verdicts.
        folder: where it is.
    """
    serves = [verdict for verdict in found if verdict.engine == VLLM and verdict.serves]
    if not serves:
        return []
    serve = shlex.join(("vllm", "serve", str(folder)))
    if all(verdict.own_code for verdict in serves):
        return ["pip install vdcompress    # beside vLLM: its plugin", serve]
    return [f"{serve} --trust-remote-code"]


def vllm_problems(layers: Sequence[LayerLayout]) -> list[str]:
    """Say all that forbids these layers on every backend of vLLM, with the plugin; empty if none.

    Args:
        layers: the layouts of all layers of a model.
    """
    found = []
    widths = {(layer.k_head_dim, layer.v_head_dim) for layer in layers}
    groups = {(layer.k_groups, layer.v_groups) for layer in layers}
    if uneven := sorted(pair for pair in groups if pair[0] != pair[1]):
        k, v = uneven[0]
        found.append(f"it keeps as many K latents as V latents, here {k} and {v}")
    if len(widths) > 1 and any(k != v for k, v in widths):
        found.append("where K and V differ in width, all layers have to be alike")
    if any(part.bits != 16 for layer in layers for part in layer.parts if part.width):
        found.append("it packs its cache itself (--kv-cache-dtype), so latents stay 16 bits wide")
    return found


def ranks(layers: Sequence[LayerLayout]) -> int | None:
    """Return over how many ranks a stock engine cuts these layers; None if heads alone limit it.

    The projections that write latents are cut between latents, never within one; a single latent
    stands whole on every rank. Maps per head (of a shared V, or of keys behind RoPE) are not cut at
    all without the plugin.
    """
    if any("per_head" in (layer.k_maps, layer.v.maps) for layer in layers):
        return 1
    groups = {count for layer in layers for count in (layer.k_groups, layer.v_groups)}
    return math.gcd(*groups) if groups != {1} else None


def common(width: int) -> bool:
    """Say whether vLLM's main GPU backend takes latents of K and V that are this wide."""
    return _flash(width, width)


def tokens_per_gib(layers: Sequence[LayerLayout], ranks: int) -> int:
    """Return how many tokens a GiB of each rank's memory holds under tensor parallelism.

    A latent is never cut: with more ranks than groups each rank keeps one, replicated. Engines that
    have ranks keep packed latents in 16 bits.
    """
    per_rank = sum(
        replace(part, groups=-(-part.groups // ranks), bits=16, quantizer=None).cache_bytes(
            TYPICAL_TOKENS
        )
        for layer in layers
        for part in layer.parts
    )
    return GIB * TYPICAL_TOKENS // per_rank


def _verdict(backend: Backend, layers: Sequence[LayerLayout]) -> Verdict:
    widths = {(layer.k_head_dim, layer.v_head_dim) for layer in layers}
    groups = {(layer.k_groups, layer.v_groups) for layer in layers}
    unequal = any(k != v for k, v in widths)
    differ = max(len(widths), len(groups)) > 1
    refused = ""
    if not all(backend.takes(k, v) for k, v in widths):
        refused = backend.rule
    elif backend.engine == VLLM and (problems := vllm_problems(layers)):
        refused = f"does not take it: {'; '.join(problems)}"
    elif not _runs_anything(backend) and any(k != v for k, v in groups):
        refused = "takes as many K latents as V latents only"
    elif not _runs_anything(backend) and differ and (backend.engine != VLLM or unequal):
        refused = "takes one layout for all layers only"
    if refused:
        return Verdict(backend.engine, backend.backend, False, refused)
    own_code = backend.needs_unequal != "nothing else" and (
        unequal or (differ and backend.engine == VLLM)
    )
    needs = backend.needs_unequal if unequal else PLUGIN if own_code else backend.needs
    note = f"needs {needs}"
    if not backend.engine.startswith("transformers"):
        note += f"; {_ranks_note(backend, layers, own_code)}"
    if not _runs_anything(backend) and any(layer.packed for layer in layers):
        note += "; keeps packed latents in 16 bits"
    return Verdict(backend.engine, backend.backend, True, note, own_code, backend.cache_dtypes)


def _runs_anything(backend: Backend) -> bool:
    return backend.engine.startswith("transformers") and backend.backend == "generate()"


def _ranks_note(backend: Backend, layers: Sequence[LayerLayout], own_code: bool) -> str:
    """Say over how many ranks of tensor parallelism a backend's engine runs these layers."""
    most = ranks(layers)
    if most is None or (own_code and backend.engine == VLLM):
        return "as many ranks as divide the heads"
    note = f"up to {most} ranks" if most > 1 else "one rank"
    return f"{note}, more with the plugin" if backend.engine == VLLM else note
