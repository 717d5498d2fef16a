"""JSON from outside: whatever is wrong with it becomes one `InputError` that names the file."""

import json
from pathlib import Path
from typing import Any

from lory_jax.errors import InputError


def parse_json(text: str | bytes, name: str | Path) -> Any:
    """The value that a JSON text stands for; bytes are UTF-8, with or without a byte-order mark.

    Raises:
      InputError: it is cut off, nested too deeply, holds a number that is too long, or is not JSON.
    """
    try:
        return json.loads(text.decode("utf-8-sig") if isinstance(text, bytes) else text)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise InputError(f"{name}: not JSON ({error})") from None


def parse_object(text: str | bytes, name: str | Path) -> dict[str, Any]:
    """`parse_json` of what must be an object."""
    value = parse_json(text, name)
    if not isinstance(value, dict):
        raise InputError(f"{name}: got {type(value).__name__}, must be a JSON object")
    return value
