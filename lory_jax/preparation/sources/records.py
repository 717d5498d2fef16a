"""What a reader yields: documents, and rejects, which say what is wrong with a broken document."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from lory_jax.data.manifest import domain_directory
from lory_jax.errors import InputError
from lory_jax.preparation.documents import Document
from lory_jax.preparation.sources.inputs import Input

MISSING = object()


@dataclass(frozen=True)
class ReadOptions:
    """How documents are made from records.

    Attributes:
      text_key: the field, or column, that holds the text. Dots reach into nested fields, such as
        `meta.body`.
      domain_key: the field that holds the domain. If it is named, every record must have it; by
        default, records may have a field `domain`.
      source_key: the field that holds the origin; as above, `source` by default.
      max_domain_bytes, seed: which files of the Python installation are read; other sources are
        read whole.
    """

    text_key: str = "text"
    domain_key: str | None = None
    source_key: str | None = None
    max_domain_bytes: int = 0
    seed: int = 0

    @property
    def keys(self) -> tuple[str, str, str]:
        """The names of the three fields."""
        return self.text_key, self.domain_key or "domain", self.source_key or "source"


@dataclass(frozen=True)
class Reject:
    """A document, or a part of a file, that cannot be used.

    Attributes:
      path: the file.
      position: where in it, such as "byte 120" or "row 7".
      reason: what is wrong, in words.
      lost_bytes: the size of what is lost, as stored; 0 where it is not known.
    """

    path: str
    position: str
    reason: str
    lost_bytes: int = 0


def read_records(
    records: Iterable[tuple[str, int, Any]], input: Input, options: ReadOptions
) -> Iterator[Document | Reject]:
    """Makes a document, or a reject, of every record.

    Args:
      records: position, size in bytes and the record: a mapping, or a `ValueError` if it is broken.
      input: what they are read from; it has the domain of records that name none.
      options: which fields are used.
    """
    for position, size, record in records:
        try:
            if isinstance(record, ValueError):
                raise record
            document = to_document(record, input.domain, options)
        except ValueError as error:
            yield Reject(input.path, position, str(error), size)
        else:
            yield document


def to_document(record: Any, default_domain: str, options: ReadOptions) -> Document:
    """Returns the document of a record; a document without a source is an origin of its own.

    Raises:
      ValueError: says what is wrong with the record.
    """
    text_key, _, _ = options.keys
    if not isinstance(record, Mapping):
        raise ValueError(f"got {type(record).__name__}, must be an object with a string {text_key}")
    text = look_up(record, text_key)
    if text is MISSING:
        found = ", ".join(sorted(map(str, record)))[:200]
        raise ValueError(f"has no field {text_key}; its fields are: {found}")
    if not isinstance(text, str):
        raise ValueError(f"{text_key} is {type(text).__name__}, must be a string")
    domain = _name(record, "domain", options.domain_key)
    source = _name(record, "source", options.source_key)
    return make_document(text, domain or default_domain, source)


def make_document(text: str, domain: str, origin: str) -> Document:
    """Returns a document whose strings are valid; an empty origin becomes the hash of the text.

    Raises:
      ValueError: says what is wrong.
    """
    try:
        contents = text.encode()
        origin.encode()
    except UnicodeEncodeError as error:
        bad = ascii(error.object[error.start])
        raise ValueError(f"not valid Unicode: {bad} at character {error.start}") from None
    _check_domain(domain)
    return Document(text, domain, origin or hashlib.sha256(contents).hexdigest())


def look_up(record: Mapping[str, Any], key: str) -> Any:
    """Returns a field by its name or by its dotted path, or MISSING."""
    if key in record:
        return record[key]
    value: Any = record
    for name in key.split("."):
        if not isinstance(value, Mapping) or name not in value:
            return MISSING
        value = value[name]
    return value


def _name(record: Mapping[str, Any], default_key: str, key: str | None) -> str:
    """Returns the string in an optional field, or in the one that the user named."""
    value = look_up(record, key or default_key)
    if value is MISSING or value is None or value == "":
        if key is None:
            return ""
        raise ValueError(f"has no {key}")
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError(f"{key or default_key} is {type(value).__name__}, must be a string")
    return str(value)


@lru_cache(maxsize=4096)
def _check_domain(domain: str) -> None:
    try:
        domain_directory(domain)
    except UnicodeEncodeError:
        raise ValueError(f"domain {ascii(domain)[:40]} is not valid Unicode") from None
    except InputError as error:
        raise ValueError(str(error)) from None
