"""Reads `metrics.jsonl`, and checks what is read again when a run is resumed or compared."""

from pathlib import Path
from typing import Any

from lory_jax.errors import InputError
from lory_jax.fields import LARGEST_INTEGER
from lory_jax.json_text import parse_object

# Numbers that are read again: those in every line, and with those that some lines have.
EVERY_LINE = ("tokens", "loss", "step_seconds")
NUMBERS = (*EVERY_LINE, "validation_loss", "dropped_tokens")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a `metrics.jsonl`; `InputError` if one is damaged."""
    found = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        where = f"{path}:{number}: damaged"
        fields = parse_object(line, where)
        if not is_integer(fields.get("step")):
            raise InputError(f"{where}, must have an integer step")
        for name in NUMBERS:
            if (name in fields or name in EVERY_LINE) and not is_number(fields.get(name)):
                raise InputError(f"{where}, {name} must be a number")
        active = fields.get("experts_active", "absent")
        if active is not None and not is_integer(active):
            raise InputError(f"{where}, experts_active must be an integer or null")
        found.append(fields)
    return found


def is_integer(value: Any) -> bool:
    """Whether a value of JSON is an integer of at most 63 bits."""
    return type(value) is int and abs(value) <= LARGEST_INTEGER


def is_number(value: Any) -> bool:
    """Whether a value of JSON is a float, NaN and infinity included, or such an integer."""
    return type(value) is float or is_integer(value)
