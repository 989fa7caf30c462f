"""The choices of a finetune, without importing what carries them out."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args, get_type_hints

from vdcompress.errors import UsageError

STAGE = "finetune"
MOST_EPOCHS = 30
MOST_SEED = 2**32 - 1  # that numpy takes
HIDDEN_WEIGHT = 10.0

Train = Literal["latents", "attention", "body", "all"]
Schedule = Literal["cosine", "linear", "constant", "wsd"]
Target = Literal["outputs", "layers"]


@dataclass(frozen=True)
class HealSettings:
    """How :func:`vdcompress.heal.heal` trains.

    The defaults are what did best at equal tokens on text that nothing trained on.

    Attributes:
        epochs: at most so many passes over the training windows, 30 or fewer; the rate falls over
            all of them, so more than a run will use keep it high.
        patience: stop after so many epochs without a better validation perplexity.
        learning_rate: highest rate of AdamW.
        latents_rate: times the rate, for the projections that compression made.
        attention_rate: times the rate, for the rest of the attention modules.
        body_rate: times the rate, for everything else but the embeddings.
        embeddings_rate: times the rate, for input and output embeddings.
        batch_size: windows per step, over all processes.
        micro_batch: windows per forward pass of one process, the rest of a step's are accumulated;
            None takes a process's whole share at once.
        distill: learn from the base's distribution; else from the text alone.
        target: what is compared with the base: its ``outputs``, or the output of each of its
            ``layers`` given the base's own input to that layer.
        kl_weight: weight of KL(base || student) when distilling.
        ce_weight: weight of the cross-entropy when distilling.
        hidden_weight: weight of the squared error of the hidden states after each layer, in units
            of the base's variance there over a window, averaged over layers. None is 10 where
            there are states to compare: when distilling outputs, and not from ``teacher_top_k``.
        temperature: divides both logits in KL, whose weight is multiplied by its square.
        teacher_top_k: compute the base's likeliest so many tokens once, keep them on disk, and
            distil from them; None runs the base beside the student in every step.
        schedule: how the rate falls after the warm-up; ``wsd`` keeps it and lets it fall linearly
            over the last fifth.
        warmup_ratio: part of all planned steps over which the rate rises from 0.
        weight_decay: of AdamW; norms and biases have none.
        max_grad_norm: gradients are clipped to this norm; 0 leaves them.
        train: what learns: ``latents``, the projections that compression made; ``attention``, these
            and the rest of the attention modules; ``body``, these and everything else but the
            embeddings; ``all``.
        seed: of the order of windows, and of dropout where a model has any.
        bf16: compute in bfloat16 (weights and optimiser stay float32); None means on CUDA.
        gradient_checkpointing: compute activations again in the backward pass, to save memory.
        max_steps: stop after so many steps, None for no bound; the rate falls towards it.
        save_steps: also save a checkpoint every so many steps within an epoch.
        chunk_tokens: tokens whose logits exist at one time.
    """

    epochs: int = 1
    patience: int = 1
    learning_rate: float = 5e-4
    latents_rate: float = 1.0
    attention_rate: float = 1.0
    body_rate: float = 1 / 3
    embeddings_rate: float = 1.0
    batch_size: int = 16
    micro_batch: int | None = None
    distill: bool = True
    target: Target = "outputs"
    kl_weight: float = 1.0
    ce_weight: float = 0.0
    hidden_weight: float | None = None
    temperature: float = 1.0
    teacher_top_k: int | None = None
    schedule: Schedule = "linear"
    warmup_ratio: float = 0.02
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    train: Train = "body"
    seed: int = 0
    bf16: bool | None = None
    gradient_checkpointing: bool = False
    max_steps: int | None = None
    save_steps: int | None = None
    chunk_tokens: int = 1024

    @property
    def hidden(self) -> float:
        """The weight of the hidden states, which ``hidden_weight`` may leave open."""
        if self.hidden_weight is not None:
            return self.hidden_weight
        compared = self.distill and self.target == "outputs" and not self.teacher_top_k
        return HIDDEN_WEIGHT if compared else 0.0

    def settled(self) -> HealSettings:
        """Return the same settings with nothing left open but what the device decides."""
        return replace(self, hidden_weight=self.hidden)

    def windows_per_step(self, windows: int) -> int:
        """Return how many windows a step takes: ``batch_size``, or all if there are fewer."""
        return min(self.batch_size, windows)

    def steps_per_epoch(self, windows: int) -> int:
        """Return the steps of one pass over so many training windows; steps are always whole."""
        return windows // self.windows_per_step(windows)

    def total_steps(self, windows: int) -> int:
        """Return the most steps that training can take."""
        steps = self.epochs * self.steps_per_epoch(windows)
        return steps if self.max_steps is None else min(steps, self.max_steps)

    def validate(self) -> None:
        """Raise one :class:`UsageError` that names every value out of range."""
        found = [
            f"{name} must be at least 1"
            for name in (*_COUNTS, *_COUNTS_OR_NONE)
            if (value := getattr(self, name)) is not None and value < 1
        ]
        found += [f"{name} must be above 0" for name in _POSITIVE if not _above(self, name, 0)]
        found += [
            f"{name} must not be negative"
            for name in _NOT_NEGATIVE
            if not (getattr(self, name) in (0, None) or _above(self, name, 0))
        ]
        if self.epochs > MOST_EPOCHS:
            found.append(f"epochs must be at most {MOST_EPOCHS}")
        if not 0 <= self.seed <= MOST_SEED:
            found.append(f"seed must be from 0 to {MOST_SEED}")
        if not 0 <= self.warmup_ratio < 1:
            found.append("warmup_ratio must be from 0 to below 1")
        found += [f"{name} must be {_either(known)}" for name, known in self._unknown()]
        found += self._contradictions()
        if found:
            raise UsageError("; ".join(found))

    def _unknown(self) -> list[tuple[str, tuple[str, ...]]]:
        """Return the choices that are none, with what they may be."""
        hints = get_type_hints(type(self))
        choices = {name: get_args(hints[name]) for name in _CHOICES}
        return [
            (name, known) for name, known in choices.items() if getattr(self, name) not in known
        ]

    def _contradictions(self) -> list[str]:
        weights = (self.kl_weight, self.ce_weight, self.hidden)
        outputs = self.target == "outputs"
        found = []
        if self.distill and outputs and not any(weights):
            found.append("kl_weight, ce_weight and hidden_weight must not all be 0")
        if not self.distill and (self.hidden_weight or self.teacher_top_k or not outputs):
            found.append(
                "hidden_weight, teacher_top_k and target='layers' need the base to distil from"
            )
        if self.teacher_top_k and (self.hidden_weight or not outputs):
            found.append("teacher_top_k keeps outputs only, not hidden states")
        if self.micro_batch and self.batch_size % self.micro_batch:
            found.append("batch_size must be a multiple of micro_batch")
        return found


_COUNTS = ("epochs", "patience", "batch_size", "chunk_tokens")
_COUNTS_OR_NONE = ("max_steps", "save_steps", "micro_batch", "teacher_top_k")
_RATES = ("latents_rate", "attention_rate", "body_rate", "embeddings_rate")
_POSITIVE = ("learning_rate", *_RATES, "temperature")
_NOT_NEGATIVE = ("kl_weight", "ce_weight", "hidden_weight", "weight_decay", "max_grad_norm")
_CHOICES = ("schedule", "train", "target")


def _above(settings: HealSettings, name: str, bound: float) -> bool:
    value = getattr(settings, name)
    return bound < value < math.inf


def _either(known: tuple[str, ...]) -> str:
    names = [repr(name) for name in known]
    return f"{', '.join(names[:-1])} or {names[-1]}"
