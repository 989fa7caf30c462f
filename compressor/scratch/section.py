"""The part of a recipe that describes a model from scratch."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from vdcompress.healing.settings import Train
from vdcompress.recipe_section import Count, Section, Seed
from vdcompress.scratch.architecture import Architecture


class FirstPhaseSection(Section):
    """What trains alone before the ``heal`` section's phase, by that section's other settings.

    ``epochs`` is at most that section's; null takes as many.
    """

    train: Train = "latents"
    epochs: Count | None = None


class ScratchSection(Section):
    """A GPT-NeoX with random weights in place of a ``model``, to compare with.

    ``tokenizer`` is a folder, an alias or a hub id; the sizes are explained at
    :class:`~vdcompress.scratch.architecture.Architecture`.
    """

    tokenizer: str = "pythia-70m"
    vocab_size: Count = Architecture.vocab_size
    hidden_size: Count = Architecture.hidden_size
    num_hidden_layers: Count = Architecture.num_hidden_layers
    num_attention_heads: Count = Architecture.num_attention_heads
    intermediate_size: Count = Architecture.intermediate_size
    max_position_embeddings: Count = Architecture.max_position_embeddings
    rotary_pct: Annotated[float, Field(gt=0, le=1)] = Architecture.rotary_pct
    qk_bias: bool = Architecture.qk_bias
    restore_from: Count | None = Architecture.restore_from
    seed: Seed = 0
    first_phase: FirstPhaseSection | None = None
