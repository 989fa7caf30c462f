"""Latents rounded without a cache, as training and a forward pass without one see them.

The numbers are those that a packed cache gives back; gradients pass straight through the rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from .layout import LayerLayout, Part
from .packed_latents import Ageing, PackedLatents
from .quantizers import quantizer


class RoundedLatents(PackedLatents):
    """Keys or values of which each query sees some rounded and others exact.

    Args:
        exact: [b, g, s, width].
        rounded: likewise.
        chosen: for each part its width, and which tokens each query sees rounded [s, s].
    """

    def __init__(
        self, exact: Tensor, rounded: Tensor, chosen: tuple[tuple[int, Tensor], ...]
    ) -> None:
        self.exact, self.rounded, self.chosen = exact, rounded, chosen
        self.shape, self.dtype, self.device = exact.shape, exact.dtype, exact.device

    def dequantize(self, start: int, stop: int) -> Tensor:
        """Return tokens as the newest query sees them, [b, g, stop - start, width]."""
        pieces, first = [], 0
        for width, chosen in self.chosen:
            own = slice(first, first + width)
            token = chosen[-1, start:stop, None]
            pieces.append(
                torch.where(
                    token,
                    self.rounded[:, :, start:stop, own],
                    self.exact[:, :, start:stop, own],
                )
            )
            first += width
        return torch.cat(pieces, dim=-1)


def rounded_side(
    x: Tensor, parts: tuple[Part, ...], sinks: int, window: int
) -> Tensor | RoundedLatents:
    """Return what a packed cache would give back for latents [b, g, s, width].

    Args:
        x: the parts side by side.
        parts: their layouts.
        sinks: first tokens that stay exact.
        window: newest tokens that stay exact.

    Returns:
        A tensor where every query sees the same, else :class:`RoundedLatents`.
    """
    ageings = [_ageing(part, sinks, window) for part in parts]
    pieces = x.split([part.width for part in parts], dim=-1)
    rounded = torch.cat(
        [
            _rounded(piece, part, ageing)
            for piece, part, ageing in zip(pieces, parts, ageings, strict=True)
        ],
        dim=-1,
    )
    if all(ageing.at_once or not ageing.token_block for ageing in ageings):
        return rounded
    tokens = torch.arange(x.shape[2], device=x.device)
    chosen = tuple(
        (part.width, tokens < ageing.packed_stops(tokens + 1)[:, None])
        for part, ageing in zip(parts, ageings, strict=True)
    )
    return RoundedLatents(x, rounded, chosen)


def rounded_layer(
    key: Tensor, value: Tensor, layout: LayerLayout, sinks: int, window: int
) -> tuple[Tensor | RoundedLatents, Tensor | RoundedLatents]:
    """Return :func:`rounded_side` of both sides of a layer."""
    keys = tuple(part for part in (layout.k_rotary, layout.k_nope) if part.width)
    return rounded_side(key, keys, sinks, window), rounded_side(value, (layout.v,), sinks, window)


def rounded_attention(  # noqa: PLR0917
    module: nn.Module,
    query: Tensor,
    key: Tensor | RoundedLatents,
    value: Tensor | RoundedLatents,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
) -> tuple[Tensor, None]:
    """Attend where each query sees some latents rounded and others exact; differentiable.

    Arguments and output are those of :func:`attention.matmul_attention`.
    """
    b, h, t, _ = query.shape
    key, value = _as_rounded(key), _as_rounded(value)
    scores, first = query.new_zeros(b, h, t, t), 0
    for width, chosen in key.chosen:
        own = slice(first, first + width)
        q, first = _grouped(query[..., own], key.shape[1]), first + width
        rounded, exact = ((q @ x[..., own].mT).view(b, h, t, t) for x in (key.rounded, key.exact))
        scores = scores + torch.where(chosen, rounded, exact)
    scores = scores * scaling
    seen = attention_mask
    if seen is None:
        seen = torch.ones(t, t, dtype=torch.bool, device=query.device).tril()
    if seen.dtype == torch.bool:
        scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    else:
        scores = scores + seen
    wide = torch.promote_types(scores.dtype, torch.float32)
    weights = functional.softmax(scores, dim=-1, dtype=wide).to(query.dtype)
    weights = functional.dropout(weights, p=dropout, training=module.training)
    ((_, chosen),) = value.chosen
    output = sum(
        (_grouped(weights * which, value.shape[1]) @ x).view(b, h, t, -1)
        for which, x in ((chosen, value.rounded), (~chosen, value.exact))
    )
    return torch.as_tensor(output).transpose(1, 2).contiguous(), None


def _grouped(x: Tensor, groups: int) -> Tensor:
    """[b, h, t, n] -> [b, g, h / g * t, n]."""
    return x.reshape(x.shape[0], groups, -1, x.shape[-1])


def _as_rounded(side: Tensor | RoundedLatents) -> RoundedLatents:
    if isinstance(side, RoundedLatents):
        return side
    tokens = side.shape[2]
    every = torch.ones(tokens, tokens, dtype=torch.bool, device=side.device)
    return RoundedLatents(side, side, ((side.shape[3], every),))


def _ageing(part: Part, sinks: int, window: int) -> Ageing:
    if not part.packed:
        return Ageing(0)
    scheme = quantizer(part.quantizer or "", part.bits).scheme
    return Ageing(scheme.token_block, sinks, window)


def _rounded(x: Tensor, part: Part, ageing: Ageing) -> Tensor:
    """Round the tokens that are ever packed."""
    if not part.packed:
        return x
    rounding = quantizer(part.quantizer or "", part.bits)
    stop = max(ageing.sinks, min(ageing.packed_stop(x.shape[2]), x.shape[2]))
    head, body, tail = x[:, :, : ageing.sinks], x[:, :, ageing.sinks : stop], x[:, :, stop:]
    return torch.cat((head, rounding.straight_through(body), tail), dim=2)
