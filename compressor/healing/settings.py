"""The choices of a finetune, without importing what carries them out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from vdcompress.errors import UsageError

STAGE = "finetune"
MOST_EPOCHS = 30


@dataclass(frozen=True)
class HealSettings:
    """How :func:`vdcompress.heal.heal` trains.

    Attributes:
        epochs: at most so many passes over the training windows, 30 or fewer; the rate falls over
            all of them, so more than a run will use keep it high.
        patience: stop after so many epochs without a better validation perplexity.
        learning_rate: highest rate of AdamW.
        batch_size: windows per step.
        distill: learn from the base's distribution; else from the text alone.
        kl_weight: weight of KL(base || student) when distilling.
        ce_weight: weight of the cross-entropy when distilling.
        temperature: divides both logits in KL, whose weight is multiplied by its square.
        schedule: how the rate falls after the warm-up.
        warmup_ratio: part of all planned steps over which the rate rises from 0.
        weight_decay: of AdamW; norms and biases have none.
        max_grad_norm: gradients are clipped to this norm; 0 leaves them.
        train: ``attention``, the attention modules alone, or ``all`` parameters.
        seed: of the order of windows, and of dropout where a model has any.
        bf16: compute in bfloat16 (weights and optimiser stay float32); None means on CUDA.
        max_steps: stop after so many steps, None for no bound; the rate falls towards it.
        save_steps: also save a checkpoint every so many steps within an epoch.
        chunk_tokens: tokens whose logits exist at one time.
    """

    epochs: int = 6
    patience: int = 1
    learning_rate: float = 2e-4
    batch_size: int = 32
    distill: bool = True
    kl_weight: float = 1.0
    ce_weight: float = 0.0
    temperature: float = 1.0
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_ratio: float = 0.01
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    train: Literal["attention", "all"] = "attention"
    seed: int = 0
    bf16: bool | None = None
    max_steps: int | None = None
    save_steps: int | None = None
    chunk_tokens: int = 1024

    def steps_per_epoch(self, windows: int) -> int:
        """Return the steps of one pass over so many training windows."""
        return math.ceil(windows / self.batch_size)

    def total_steps(self, windows: int) -> int:
        """Return the most steps that training can take."""
        steps = self.epochs * self.steps_per_epoch(windows)
        return steps if self.max_steps is None else min(steps, self.max_steps)

    def validate(self) -> None:
        """Raise one :class:`UsageError` that names every value out of range."""
        at_least_one = ("epochs", "patience", "batch_size", "chunk_tokens")
        found = [f"{name} must be at least 1" for name in at_least_one if getattr(self, name) < 1]
        for name in ("max_steps", "save_steps"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                found.append(f"{name} must be at least 1")
        found += [
            f"{n} must be above 0"
            for n in ("learning_rate", "temperature")
            if not getattr(self, n) > 0
        ]
        if self.epochs > MOST_EPOCHS:
            found.append(f"epochs must be at most {MOST_EPOCHS}")
        not_negative = ("kl_weight", "ce_weight", "weight_decay", "max_grad_norm")
        found += [
            f"{name} must not be negative" for name in not_negative if getattr(self, name) < 0
        ]
        if not 0 <= self.warmup_ratio < 1:
            found.append("warmup_ratio must be from 0 to below 1")
        if self.distill and self.kl_weight == self.ce_weight == 0:
            found.append("kl_weight and ce_weight must not both be 0")
        if self.train not in ("attention", "all"):
            found.append("train must be 'attention' or 'all'")
        if self.schedule not in ("cosine", "linear", "constant"):
            found.append("schedule must be 'cosine', 'linear' or 'constant'")
        if found:
            raise UsageError("; ".join(found))
