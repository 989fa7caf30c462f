"""The figures of a run's ``results.json``, as far as other commands show or use them."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

Number = Annotated[float, Field(gt=0)]  # NaN is not
Count = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(ge=0)]


class _Part(BaseModel):
    """A part of the document: what it names must be sound, what it does not is left alone."""

    model_config = ConfigDict(extra="ignore", strict=True, protected_namespaces=())


class _Perplexities(_Part):
    base: Number | None = None
    compressed: Number | None = None
    healed: Number | None = None


class _Bucket(_Perplexities):
    first: Count = Field(alias="from")
    to: Count


class _Cache(_Part):
    base_bytes_per_token: Annotated[int, Field(gt=0)]
    bytes_per_token: Annotated[int, Field(gt=0)]


class _Epoch(_Part):
    val_ppl: Number


class _Healing(_Part):
    best_epoch: Count
    initial_val_ppl: Number
    epochs: list[_Epoch] = Field(min_length=1)
    tokens: Count
    seconds: Seconds

    @model_validator(mode="after")
    def _best_is_one_of_them(self) -> _Healing:
        if self.best_epoch > len(self.epochs):
            raise ValueError(f"best_epoch is {self.best_epoch} of {len(self.epochs)}")
        return self


class _Figures(_Part):
    parameters: dict[str, Count | None]
    kv_cache: _Cache
    perplexity: _Perplexities | None = None
    positions: list[_Bucket] | None = None
    healing: _Healing | None = None
    seconds: dict[str, Seconds]


def first_fault(document: dict[str, Any]) -> str:
    """Return what is wrong with a document and where, empty if nothing that is checked is."""
    try:
        _Figures.model_validate(document)
    except ValidationError as error:
        detail = error.errors()[0]
        place = ".".join(map(str, detail["loc"]))
        return f"{place}: {detail['msg'].removeprefix('Value error, ')}"
    return ""
