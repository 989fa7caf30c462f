"""What the healing benches read: token windows of the training text, and a compressed start.

The windows come from the file that ``bench/healing_tokens.py`` writes, named by
VDCOMPRESS_HEAL_TOKENS. ``train`` is the whole training part of the training text; what chooses and
stops is from its validation part.
"""

from __future__ import annotations

import math
import os
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import perplexity
import token_sets
import torch
from keys_and_groups import FISHER
from torch import Tensor

from vdcompress.calibrate import EVERYTHING, calibrate
from vdcompress.gains import gains
from vdcompress.healing.divergence import Objective
from vdcompress.healing.objective import losses
from vdcompress.load import Base
from vdcompress.plan import Plan, Start, plan_for
from vdcompress.request import Request

END = 0  # the token between documents


def tokens(name: str) -> Tensor:
    """Return one array of the file, int64."""
    file = os.environ.get("VDCOMPRESS_HEAL_TOKENS")
    if not file:
        sys.exit("set VDCOMPRESS_HEAL_TOKENS to what bench/healing_tokens.py wrote")
    with np.load(file) as found:
        return torch.from_numpy(found[name].astype(np.int64))


def windows(
    length: int,
    count: int | None = None,
    seed: int = 0,
    balance: float = 1.0,
    twice: bool = True,
) -> Tensor:
    """Return windows [count, length] from all over the training text; None for all of it.

    A document is worth its length to the power of ``balance``, shared by its windows; with 1 every
    window is worth the same, with less those of short documents may come more than once, or are
    only likelier to be among the windows where ``twice`` is not allowed.
    """
    stream = tokens("train")
    whole = stream[: len(stream) // length * length].view(-1, length)
    if count is None:
        return whole
    draw = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(whole), generator=draw)
    worth = document_lengths(stream)[::length][: len(whole)].double().pow(balance - 1.0)[order]
    if twice:
        edges = worth.cumsum(0) * (count / worth.sum())
        chosen = torch.searchsorted(edges, torch.arange(count, dtype=edges.dtype) + 0.5)
    else:
        arrivals = torch.empty_like(worth).exponential_(generator=draw) / worth
        chosen = arrivals.argsort()[:count]
    return whole[order[chosen]][torch.randperm(count, generator=draw)]


def document_lengths(stream: Tensor) -> Tensor:
    """Return for each token how many its document has; documents end with the token 0."""
    ends = torch.cat([(stream == END).nonzero().flatten(), torch.tensor([len(stream) - 1])])
    ends = ends.unique()
    sizes = ends.diff(prepend=torch.tensor([-1]))
    return sizes.repeat_interleave(sizes)


@dataclass(frozen=True)
class Starts:
    """Makes compressed models of one base, all calibrated on the same windows."""

    base: Base
    sets: dict[str, Tensor]
    calibration: Tensor
    statistics: Any
    gains: Any

    @classmethod
    def of(cls, base: Base, calibration: str = token_sets.CALIBRATION) -> Starts:
        """Calibrate on one of the sets."""
        sets = token_sets.read()
        found = sets[calibration]
        statistics = calibrate(base, found, needs=EVERYTHING)
        return cls(base, sets, found, statistics, gains(base.shape, statistics))

    def plan(self, asked: dict[str, Any], start: Start = FISHER) -> Plan:
        """Return the plan for a request."""
        return plan_for(self.base.shape, Request.of(**asked), start, self.gains)

    def student(self, asked: dict[str, Any], start: Start = FISHER) -> Any:
        """Return a compressed model as the product makes it."""
        plan = self.plan(asked, start)
        return perplexity.compress(self.base, plan, self.statistics, self.calibration)

    def held_out(self, student: Any) -> dict[str, float]:
        """Return validation perplexity and KL, by which settings are chosen."""
        total, cross_entropy, count = 0.0, 0.0, 0
        objective = Objective(kl=1.0, ce=0.0, chunk=4096)
        student.eval()
        with torch.no_grad():
            for part in tokens("validation-1024").split(8):
                ids = part.to(student.device)
                found = losses(student, self.base.model, ids, objective)
                total += found.objective.item()
                cross_entropy += found.cross_entropy.item()
                count += found.tokens
        return {"val_ppl": math.exp(cross_entropy / count), "val_kl": total / count}
