"""The special tokens of a model: what begins, ends and pads a document, and its chat template.

A tokenizer JSON does not say which of its special tokens begin and end a document. A tokenizer that
we trained, and many others, say it by the usual names. What the files beside an imported tokenizer
declare is kept in a file of its own, because a tokenizer JSON has no place for it.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lory_jax.errors import InputError
from lory_jax.json_text import parse_object

SPECIAL_TOKENS_NAME = "tokenizer_special.json"


@dataclass(frozen=True)
class SpecialTokens:
    """What begins, ends and pads a document.

    Attributes:
      bos_id: begins every document.
      eos_ids: the first ends every document; each of them ends a generated text.
      pad_id: fills up shorter rows; None if the model has no token for it.
      chat_template: as in `tokenizer_config.json`: a template, or a list of named ones.
    """

    bos_id: int
    eos_ids: tuple[int, ...]
    pad_id: int | None = None
    chat_template: str | list[dict[str, str]] | None = None

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str, name: str) -> "SpecialTokens":
        """Reads what `to_json` wrote; an `InputError` says that `name` is damaged."""
        fields = parse_object(text, name)
        try:
            eos_ids = one_or_more(fields["eos_ids"])
            found = cls(fields["bos_id"], eos_ids, fields.get("pad_id"), fields["chat_template"])
        except (KeyError, TypeError) as error:
            raise InputError(f"{name}: malformed ({error!r})") from None
        if not isinstance(found.bos_id, int) or not eos_ids:
            raise InputError(f"{name}: malformed, must have bos_id and eos_ids")
        if not isinstance(found.pad_id, int | None):
            raise InputError(f"{name}: pad_id: got {found.pad_id!r}, must be an integer or null")
        _check_template(found.chat_template, name)
        return found


def declared(directory: Path) -> dict[str, Any]:
    """What the files of a Hugging Face directory say about special tokens.

    Returns:
      `bos_token_id` and `pad_token_id` (None if unknown), `eos_token_id` (a tuple), `names` (token
      texts by `bos_token`, `eos_token` and `pad_token`) and `chat_template`.

    Raises:
      InputError: a file is damaged, or an id is not an integer.
    """
    config, generation, tokenizer = (
        _object_if_present(directory / name)
        for name in ("config.json", "generation_config.json", "tokenizer_config.json")
    )
    found: dict[str, Any] = {}
    for field in ("bos_token_id", "pad_token_id", "eos_token_id"):
        values = [*_ids(config, field, directory), *_ids(generation, field, directory)]
        found[field] = tuple(dict.fromkeys(values))
    for field in ("bos_token_id", "pad_token_id"):
        found[field] = found[field][0] if found[field] else None
    names = {field: tokenizer.get(field) for field in ("bos_token", "eos_token", "pad_token")}
    texts = {
        field: token.get("content") if isinstance(token, Mapping) else token
        for field, token in names.items()
    }
    found["names"] = {field: text for field, text in texts.items() if isinstance(text, str)}
    found["chat_template"] = tokenizer.get("chat_template")
    template = directory / "chat_template.jinja"
    if found["chat_template"] is None and template.is_file():
        found["chat_template"] = template.read_text("utf-8", errors="replace")
    _check_template(found["chat_template"], str(directory))
    return found


def one_or_more(value: Any) -> tuple[int, ...]:
    """An id or a list of ids as a tuple; None, and the -1 of old files, mean no id."""
    values = value if isinstance(value, list | tuple) else [value]
    values = [v for v in values if v is not None and v != -1]
    if not all(isinstance(v, int) and not isinstance(v, bool) for v in values):
        raise TypeError(f"got {value!r}, must be an integer or a list of integers")
    return tuple(values)


def _check_template(template: Any, name: str) -> None:
    named = template if isinstance(template, list) else []
    if not (
        template is None
        or isinstance(template, str)
        or (all(isinstance(t, dict) and {"name", "template"} <= t.keys() for t in named) and named)
    ):
        raise InputError(
            f"{name}: chat_template: got {type(template).__name__}, must be a text or a list of "
            "objects with name and template"
        )


def _ids(contents: Mapping[str, Any], field: str, directory: Path) -> tuple[int, ...]:
    try:
        return one_or_more(contents.get(field))
    except TypeError as error:
        raise InputError(f"{directory}: {field}: {error}") from None


def _object_if_present(path: Path) -> dict[str, Any]:
    return parse_object(path.read_bytes(), path) if path.is_file() else {}
