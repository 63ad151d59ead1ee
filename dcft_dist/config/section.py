"""Base class of all sections of the schema, and the types of common values."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import date, time
from typing import Annotated, Any, get_args

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

DEPTH = 20  # levels of tables and lists in a value


Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


Positive = Annotated[float, Field(gt=0.0)]


Count = Annotated[int, Field(ge=1)]


Seed = Annotated[int, Field(ge=0, lt=2**63)]


ImportPath = Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")]


class Section(BaseModel):
    """A section of the configuration. Unknown keys are errors, and values cannot be changed."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _can_be_written(cls, values: Any) -> Any:
        """Refuses values that no file can hold as they are, so that a run's `config.toml` says what was asked for."""
        for value in _parts(values):
            if isinstance(value, str) and "\0" in value:
                raise ValueError(f"{value[:40]!r} has a null character")
            if isinstance(value, str) and any("\ud800" <= sign <= "\udfff" for sign in value):
                raise ValueError(f"{value[:40]!r} is no valid text")
            if isinstance(value, date | time):  # also date and time together
                raise ValueError(f"{value} is a date or time: put it in quotes")
        return values

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, field: ValidationInfo) -> Any:
        """Refuses `true` where a number is wanted: pydantic would read it as 1."""
        for part in _parts(value):  # also in lists
            if isinstance(part, bool):
                taken = set(_types(cls.model_fields[str(field.field_name)].annotation))
                if taken & {int, float} and not taken & {bool, Any}:
                    raise ValueError(f"{str(part).lower()} is no number")
        return value


def one_line(text: str) -> str:
    """Checks that a text has no line breaks and other control characters, which would write further lines into a file.

    Raises:
        ValueError: it has some.
    """
    if not text.isprintable():
        raise ValueError(f"{text!r} has a line break or another control character")
    return text


OneLine = Annotated[str, AfterValidator(one_line)]


def _types(annotation: Any) -> Iterator[Any]:
    """The type, or all that it is made of."""
    yield annotation
    for part in get_args(annotation):
        yield from _types(part)


def _parts(values: Any, depth: int = 0) -> Iterator[Any]:
    """Everything in tables within tables and lists.

    Raises:
        ValueError: they are nested too deeply.
    """
    if depth > DEPTH:
        raise ValueError(f"tables and lists are nested more than {DEPTH} deep")
    if isinstance(values, dict):
        for key, value in values.items():
            yield key
            yield from _parts(value, depth + 1)
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _parts(value, depth + 1)
    else:
        yield values
