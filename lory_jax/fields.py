"""One config field, and the kinds of fields there are; `schema.py` declares them."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

_ONE_OF = "one of "
LARGEST_INTEGER = 2**63 - 1  # what NumPy, JAX and the data pipeline can hold


@dataclass(frozen=True)
class Field:
    """One config field.

    Attributes:
      default: its value where a recipe sets none.
      meaning: what it means, with its unit.
      accepts: what values it accepts, as the end of a sentence that begins with "must be".
      check: whether it accepts a value.
      is_architecture: whether trained parameters mean something else, or do not fit, if it differs.
      of_experts: the same, but only between models with experts.
      may_change: whether a run may be resumed with another value, because the field decides how
        the run is computed, logged or saved, not what is computed.
      is_size: whether every saved config has it; a config without it is damaged, not old.
    """

    default: Any
    meaning: str
    accepts: str
    check: Callable[[Any], bool]
    is_architecture: bool = False
    of_experts: bool = False
    may_change: bool = False
    is_size: bool = False

    @property
    def choices(self) -> tuple[str, ...]:
        """The values that a choice accepts; none for other fields."""
        names = self.accepts.removeprefix(_ONE_OF)
        return tuple(names.split(", ")) if names != self.accepts else ()


def int_field(default: int, meaning: str, low: int, **properties: bool) -> Field:
    def check(value: Any) -> bool:
        return type(value) is int and low <= value <= LARGEST_INTEGER

    return Field(default, meaning, f"an integer of at least {low}", check, **properties)


def float_field(
    default: float,
    meaning: str,
    low: float,
    high: float = sys.float_info.max,
    **properties: bool,
) -> Field:
    is_bounded = high < sys.float_info.max
    accepts = (
        f"a number from {low:g} to {high:g}" if is_bounded else f"a number of at least {low:g}"
    )

    def check(value: Any) -> bool:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return is_number and low <= value <= high

    return Field(default, meaning, accepts, check, **properties)


def choice_field(meaning: str, *choices: str, **properties: bool) -> Field:
    def check(value: Any) -> bool:
        return isinstance(value, str) and value in choices

    return Field(choices[0], meaning, _ONE_OF + ", ".join(choices), check, **properties)


def bool_field(default: bool, meaning: str, **properties: bool) -> Field:
    return Field(
        default, meaning, "true or false", lambda value: isinstance(value, bool), **properties
    )


def all_may_change(fields: dict[str, Field]) -> dict[str, Field]:
    """A section whose every field may change when a run is resumed."""
    return {name: replace(field, may_change=True) for name, field in fields.items()}
