"""Losses of single tokens, added up by position, become perplexities."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from vdcompress.errors import ModelError


@dataclass(frozen=True)
class Bucket:
    """Perplexity of the positions ``start`` to ``stop - 1`` of all windows.

    Attributes:
        start: first position in the window; position 0 predicts from one token.
        stop: one past the last.
        base: of the base model, None if it was not given.
        compressed: of the model measured.
    """

    start: int
    stop: int
    base: float | None
    compressed: float


@dataclass(frozen=True)
class Evaluation:
    """What :func:`evaluate` measured.

    Attributes:
        perplexity: exp of the mean cross-entropy per predicted token.
        base_perplexity: of the base on the same tokens, None if it was not given.
        kl: mean over tokens of KL(base || model) in nats, None without a base.
        tokens: predicted tokens.
        window: inputs per window.
        positions: perplexity by position in the window.
    """

    perplexity: float
    base_perplexity: float | None
    kl: float | None
    tokens: int
    window: int
    positions: tuple[Bucket, ...]

    @property
    def ratio(self) -> float | None:
        """Perplexity over that of the base, None without a base."""
        return None if self.base_perplexity is None else self.perplexity / self.base_perplexity

    def to_json(self, *, data: str | None = None, healed: bool = False) -> dict[str, Any]:
        """Return the fields ``perplexity`` and ``positions`` of the program's JSON.

        Args:
            data: name of the text.
            healed: the model was finetuned after compression, so its figure is ``healed``.
        """
        perplexity = {
            "base": self.base_perplexity,
            "compressed": None if healed else self.perplexity,
            "healed": self.perplexity if healed else None,
            "ratio": self.ratio,
            "kl": self.kl,
            "tokens": self.tokens,
            "window": self.window,
            "data": data,
        }
        buckets = [asdict(bucket) for bucket in self.positions]
        return {
            "perplexity": perplexity,
            "positions": [{"from": b.pop("start"), "to": b.pop("stop"), **b} for b in buckets],
        }


class LossSums:
    """Adds up the losses of windows by position; what every evaluation ends in.

    Args:
        window: inputs per window.
        with_base: losses of the base and the KL to it are given too.
    """

    def __init__(self, window: int, *, with_base: bool) -> None:
        names = ("model", "base", "kl") if with_base else ("model",)
        self.windows = 0
        self._sums = {name: torch.zeros(window, dtype=torch.float64) for name in names}
        self._counts = torch.zeros(window, dtype=torch.float64)

    def add(self, losses: dict[str, Tensor]) -> None:
        """Add windows of one length.

        Args:
            losses: of each predicted token, [b, t], for ``model``, ``base`` and ``kl``.

        Raises:
            ModelError: one is NaN or infinite; names the model and the window.
        """
        for name, loss in losses.items():
            _check_finite(loss, name, self.windows)
            self._sums[name][: loss.shape[1]] += loss.double().sum(0).cpu()
        count, length = losses["model"].shape
        self._counts[:length] += count
        self.windows += count

    def perplexity(self) -> float:
        """Return the model's perplexity so far."""
        return _perplexity(self._sums["model"], self._counts)

    def evaluation(self, positions: Sequence[int]) -> Evaluation:
        """Return the result, in buckets between these positions too."""
        sums, counts = self._sums, self._counts
        with_base = "base" in sums
        return Evaluation(
            perplexity=self.perplexity(),
            base_perplexity=_perplexity(sums["base"], counts) if with_base else None,
            kl=(sums["kl"].sum() / counts.sum()).item() if with_base else None,
            tokens=int(counts.sum()),
            window=len(counts),
            positions=tuple(_buckets(sums, counts, positions, with_base=with_base)),
        )


def _check_finite(loss: Tensor, name: str, done: int) -> None:
    bad = ~torch.isfinite(loss).all(1)
    if bad.any():
        which = {"model": "the model", "base": "the base", "kl": "KL to the base"}[name]
        number = done + int(bad.nonzero()[0]) + 1
        raise ModelError(
            f"the loss of {which} is NaN or infinite in window {number}",
            "the weights are damaged, or the data type is too narrow: try --dtype float32",
        )


def _perplexity(sums: Tensor, counts: Tensor) -> float:
    return (sums.sum() / counts.sum()).exp().item()


def _buckets(
    sums: dict[str, Tensor], counts: Tensor, positions: Sequence[int], *, with_base: bool
) -> Iterator[Bucket]:
    """Yield the buckets that hold a token; the last one is cut at the window's end."""
    for start, edge in itertools.pairwise(positions):
        stop = min(edge, len(counts))
        if start < stop:
            part = slice(start, stop)
            base = _perplexity(sums["base"][part], counts[part]) if with_base else None
            yield Bucket(start, stop, base, _perplexity(sums["model"][part], counts[part]))
