"""The contract of an initialiser: which latents it takes, by which metric."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from vdcompress.latents.keys import KeyMetric, KeyProblem
from vdcompress.latents.values import Latents, ValueProblem


def plain_keys(problem: KeyProblem) -> KeyMetric:
    """Weigh all errors of the centred keys alike: their principal components."""
    keys = problem.keys()
    identity = torch.eye(keys.mean.shape[-1], dtype=keys.mean.dtype, device=keys.mean.device)
    return KeyMetric(identity.expand_as(keys.covariance), keys)


@dataclass(frozen=True)
class Initializer:
    """A named way to find latents.

    Attributes:
        solve: maps a problem to latents of V; at full width they restore every value exactly.
        needs: which moments it reads for V where each key/value head has a latent.
        shared_needs: which it reads for V where heads share one; None is the same.
        keys: the metric by which latents of K are found.
        key_needs: which moments it reads for K.
        default_refit: ``none`` or ``local`` when the user names neither.
        default_alternate: rounds of alternation when the user names no number.
    """

    solve: Callable[[ValueProblem], Latents]
    needs: frozenset[str]
    shared_needs: frozenset[str] | None = None
    keys: Callable[[KeyProblem], KeyMetric] = plain_keys
    key_needs: frozenset[str] = frozenset({"keys"})
    default_refit: str = "none"
    default_alternate: int = 0
