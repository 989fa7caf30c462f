"""The texts that a recipe names, as tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vdcompress.data.corpus import Hashed, Role, Source, documents
from vdcompress.data.packing import pack_windows
from vdcompress.data.windows import draw_windows, tokenise
from vdcompress.errors import DataError
from vdcompress.events import OnEvent, Warned, ignore
from vdcompress.recipe import Recipe

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

VALIDATION_SEED = 0


@dataclass(frozen=True)
class Windows:
    """Token windows and the digest of the text that they came from.

    Attributes:
        tokens: [n, length].
        digest: of all documents of the source's role.
    """

    tokens: Tensor
    digest: str


def calibration_windows(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Windows:
    """Draw the windows that calibrate."""
    section = recipe.calibration
    source = Source.parse(section.data, field=recipe.text_field)
    texts = Hashed(documents(source, "training"))
    drawn = draw_windows(
        texts,
        tokenizer,
        count=section.samples,
        length=section.seq_len,
        seed=section.seed,
        balance=section.balance,
    )
    return Windows(drawn, texts.digest())


def healing_windows(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, on_event: OnEvent = ignore
) -> tuple[Tensor, Tensor]:
    """Return the sequences that heal and those that decide when to stop, both [n, seq_len].

    The former are packed, so that none of them repeats another. The latter depend on the text and
    their own number and length alone, so that finetunes of one text are comparable whatever else
    differs. A text that is too short gives as many as it holds, with a warning.
    """
    section = recipe.heal
    source = Source.parse(section.data or recipe.calibration.data, field=recipe.text_field)
    training = pack_windows(
        documents(source, "training"),
        tokenizer,
        count=section.samples,
        length=section.seq_len,
        seed=section.seed,
        balance=section.balance,
        allow_fewer=True,
    )
    validation = draw_windows(
        documents(source, "validation"),
        tokenizer,
        count=section.validation_samples,
        length=section.seq_len,
        seed=VALIDATION_SEED,
        allow_fewer=True,
    )
    return (
        _all_of(training, section.samples, source, "training", on_event),
        _all_of(validation, section.validation_samples, source, "validation", on_event),
    )


def evaluation_windows(
    recipe: Recipe, tokenizer: PreTrainedTokenizerBase, on_event: OnEvent = ignore
) -> Tensor:
    """Draw windows that measure at random places, as healing's are drawn; [n, seq_len + 1].

    Each has ``seq_len`` inputs and predicts as many tokens. A text that is too short for all of
    them gives as many as it holds, with a warning.
    """
    section, source = recipe.evaluation, _measuring_source(recipe)
    texts = documents(source, "evaluation", whole=not _also_trains(recipe))
    drawn = draw_windows(
        texts,
        tokenizer,
        count=section.windows,
        length=section.seq_len + 1,
        seed=recipe.heal.seed,
        allow_fewer=True,
    )
    return _all_of(drawn, section.windows, source, "evaluation", on_event)


def evaluation_tokens(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Return the tokens that measure, [n]: at most those of the windows asked for.

    Raises:
        DataError: fewer than one window.
    """
    section = recipe.evaluation
    source = _measuring_source(recipe)
    texts = documents(source, "evaluation", whole=not _also_trains(recipe))
    tokens = tokenise(texts, tokenizer, limit=section.windows * section.seq_len + 1)
    if len(tokens) <= section.seq_len:
        raise DataError(
            f"{source.name} holds {len(tokens):,} tokens to measure on, fewer than one window of "
            f"{section.seq_len:,}",
            "give more text (--eval-data), or set evaluation.seq_len in a recipe",
        )
    return tokens


def evaluation_data(recipe: Recipe) -> str:
    """Return what the evaluation reads."""
    return recipe.evaluation.data or recipe.calibration.data


def _measuring_source(recipe: Recipe) -> Source:
    return Source.parse(evaluation_data(recipe), field=recipe.text_field)


def _all_of(drawn: Tensor, count: int, source: Source, role: Role, on_event: OnEvent) -> Tensor:
    """Return what was drawn, with a warning where it is fewer than ``count``."""
    if len(drawn) < count:
        on_event(Warned(f"{source.name} holds {len(drawn):,} sequences for {role}, not {count:,}"))
    return drawn


def _also_trains(recipe: Recipe) -> bool:
    """Say whether the text that measures also calibrates or heals; then only a part measures."""
    return evaluation_data(recipe) in (recipe.calibration.data, recipe.heal.data)
