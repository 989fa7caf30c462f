"""Perplexity of the original models with Palu's scheme and with an fp8 cache, reimplemented here.

    VDCOMPRESS_STANDINS=... VDCOMPRESS_TOKENS=... python bench/simulated_peers.py pythia-70m-standin

Palu (arXiv 2407.21118): keys before RoPE and values of each group of up to four heads become one
latent by the whitened singular value decomposition of their weights, which is the uncentred PCA of
what these weights give; latents are turned by an orthogonal matrix and rounded per token, and
restored to full width before they are attended. Ranks are equal in all layers here, where Palu also
has an allocation by Fisher information. fp8 rounds keys behind RoPE and values to e4m3 without
scales. Nothing is stored: what a cache would give back is put where the projections' outputs are.
A row is saved as soon as it is there; what the file has is not made again.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import record
import standins
import token_sets
import torch
from bits_frontier import MEASURED, measured
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from vdcompress.attention_tap import attending_by
from vdcompress.load import Base, load
from vdcompress.modeling.quantizer import Quantizer
from vdcompress.modeling.quantizers import quantizer
from vdcompress.modeling.schemes import PER_TOKEN

HEADS = 4  # that share a latent
SHARES = (0.75, 0.5)  # of the numbers
BITS = (4, 3)
FP8 = "fp8 (e4m3)"
BATCH = 4
SIDES = ("k", "v")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=("llama-32m-standin", "pythia-70m-standin"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--windows", type=int, default=token_sets.WINDOWS)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    options.through_cache = False
    base = load(standins.model(options.model), device=options.device)
    sets = token_sets.read()
    texts = {name: sets[name] for name in MEASURED}
    name = f"simulated-peers-{options.model}"
    body: dict[str, Any] = {"model": options.model, "windows": options.windows}
    body |= {"heads": HEADS, "rows": record.earlier_rows(name, out=options.out)}
    there = {row["cache"] for row in body["rows"]}
    palu: Palu | None = None
    for row_name, share, bits in wanted():
        if row_name in there:
            continue
        if share is None:
            size: float = 2 * base.shape.layers * base.shape.kv_dim
            way = attending_by(base.model, "vdcompress_fp8", attend_fp8)
        else:
            palu = palu or Palu(base, sets[token_sets.CALIBRATION])
            size, way = palu.bytes_per_token(share, bits), palu.applied(share, bits)
        with way:
            found = measured(base.model, texts, options)["texts"]
        row = {"cache": row_name, "bytes_per_token": size, "texts": found}
        body["rows"].append(row | {"environment": record.environment()})
        print(row_name, size, *(f"{x['perplexity']:.3f}" for x in found.values()), flush=True)
        record.write(name, body, out=options.out)


def wanted() -> Iterator[tuple[str, float | None, int]]:
    """Yield the name of each row, the share of the numbers that it keeps, and its bits."""
    yield FP8, None, 8
    for share in SHARES:
        for bits in BITS:
            yield f"Palu {share:.0%} int{bits}", share, bits


def attend_fp8(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attend over keys and values as an fp8 cache gives them back."""
    key, value = (x.to(torch.float8_e4m3fn).to(x.dtype) for x in (key, value))
    return sdpa_attention_forward(module, query, key, value, mask, **kwargs)[0], None


class Palu:
    """Palu's latents of a model.

    Args:
        base: the model.
        windows: what whitens, [n, t].
    """

    def __init__(self, base: Base, windows: Tensor) -> None:
        self.base, shape = base, base.shape
        self.heads = min(HEADS, shape.kv_heads)
        self.groups, self.width = shape.kv_heads // self.heads, self.heads * shape.head_dim
        self.moments = self._moments(windows)
        draw = torch.Generator().manual_seed(0)
        self._draw = lambda n: torch.linalg.qr(torch.randn(n, n, generator=draw).double())[0]

    @torch.inference_mode()
    def _moments(self, windows: Tensor) -> dict[tuple[int, str], Tensor]:
        """Return the second moments [groups, width, width] of every layer and side."""
        square = torch.zeros(self.groups, self.width, self.width, dtype=torch.float64)
        found = {(i, side): square.clone() for i in range(self.base.shape.layers) for side in SIDES}

        def take(layer: int, side: str, x: Tensor) -> Tensor:
            flat = x.flatten(0, 1).transpose(0, 1).double()
            found[layer, side] += (flat.mT @ flat).cpu()
            return x

        with self._changed(take):
            for batch in windows.split(BATCH):
                self.base.model.base_model(batch.to(self.base.model.device), use_cache=False)
        return found

    def rank(self, share: float) -> int:
        """Return the numbers of a latent."""
        return round(share * self.width)

    def bytes_per_token(self, share: float, bits: int) -> float:
        """Return the bytes of a token of all layers, scales and zero points counted."""
        size = quantizer(PER_TOKEN.name, bits).bytes(1, self.rank(share))
        return size * self.groups * len(SIDES) * self.base.shape.layers

    @contextmanager
    def applied(self, share: float, bits: int) -> Iterator[None]:
        """Let the projections give what this cache gives back."""
        rounding, rank = quantizer(PER_TOKEN.name, bits), self.rank(share)
        maps = {}
        for key, moments in self.moments.items():
            _, vectors = torch.linalg.eigh(moments)
            maps[key] = (vectors[..., -rank:] @ self._draw(rank)).float()

        def restore(layer: int, side: str, x: Tensor) -> Tensor:
            return restored(rounding, maps[layer, side].to(x.device), x)

        with self._changed(restore):
            yield

    @contextmanager
    def _changed(self, change: Any) -> Iterator[None]:
        """Change keys before RoPE and values, [b, t, groups, width], biases aside."""
        with ExitStack() as stack:
            for layer, module in enumerate(projections(self.base.model)):
                for linear, sides in module:
                    hook = _Hook(self, layer, sides, change)
                    stack.callback(linear.register_forward_hook(hook).remove)
            yield


class _Hook:
    """Changes the parts of a projection's output that are of the given sides.

    A fused projection has queries, keys and values of each head side by side.
    """

    def __init__(self, palu: Palu, layer: int, sides: tuple[str | None, ...], change: Any) -> None:
        self.palu, self.layer, self.sides, self.change = palu, layer, sides, change

    def __call__(self, linear: nn.Linear, _inputs: Any, output: Tensor) -> Tensor:
        bias = 0 if linear.bias is None else linear.bias
        parts = (output - bias).unflatten(-1, (-1, len(self.sides), self.palu.base.shape.head_dim))
        changed = [
            x if side is None else self._by_group(side, x)
            for side, x in zip(self.sides, parts.unbind(-2), strict=True)
        ]
        return torch.stack(changed, dim=-2).flatten(-3) + bias

    def _by_group(self, side: str, x: Tensor) -> Tensor:
        grouped = x.flatten(-2).unflatten(-1, (self.palu.groups, self.palu.width))
        return self.change(self.layer, side, grouped).reshape(x.shape)


def restored(rounding: Quantizer, to_rank: Tensor, x: Tensor) -> Tensor:
    """Return [b, t, g, width] of latents by maps [g, width, rank], rounded and turned back."""
    latents = rounding.read_back(torch.einsum("btgw,gwr->bgtr", x, to_rank))
    return torch.einsum("bgtr,gwr->btgw", latents, to_rank)


def projections(model: Any) -> Iterator[list[tuple[nn.Linear, tuple[str | None, ...]]]]:
    """Yield each layer's linear modules that give keys and values, and what they give."""
    for layer in model.base_model.layers:
        if hasattr(layer, "attention"):
            yield [(layer.attention.query_key_value, (None, "k", "v"))]
        else:
            yield [(layer.self_attn.k_proj, ("k",)), (layer.self_attn.v_proj, ("v",))]


if __name__ == "__main__":
    main()
