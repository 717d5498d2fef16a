"""Fields of a Hugging Face config.json, each checked when it is read."""

from collections.abc import Mapping
from typing import Any

from lory_jax.errors import InputError


def size(contents: Mapping[str, Any], field: str, name: str, default: int | None = None) -> int:
    """A positive integer; `name` is that of the file, for messages."""
    value = contents.get(field)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**63:
        raise InputError(f"{name}: {field}: got {value!r}; must be a positive integer")
    return value


def number(
    contents: Mapping[str, Any], field: str, name: str, default: float | None = None
) -> float:
    """A positive number."""
    value = contents.get(field)
    value = default if value is None else value
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e300:
        raise InputError(f"{name}: {field}: got {value!r}; must be a positive number")
    return float(value)


def flag(contents: Mapping[str, Any], field: str, name: str) -> bool:
    """True or false; a missing one is false."""
    value = contents.get(field)
    if value is not None and not isinstance(value, bool):
        raise InputError(f"{name}: {field}: got {value!r}; must be true or false")
    return bool(value)
