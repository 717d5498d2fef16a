"""Reads a text file, which is one document."""

import json
from typing import IO

from lory_jax.preparation.documents import Document
from lory_jax.preparation.sources.inputs import Input
from lory_jax.preparation.sources.records import Reject, make_document


def read_text(stream: IO[bytes], input: Input, text_key: str) -> Document | Reject:
    """Returns the document that is the whole file."""
    contents = stream.read()
    try:
        text = contents.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        reason = f"not UTF-8 (0x{contents[error.start]:02x}); convert it or move it elsewhere"
        return Reject(input.path, f"byte {error.start}", reason, len(contents))
    if _is_json_lines(text, text_key):
        reason = "holds JSON lines; rename it to .jsonl"
        return Reject(input.path, "byte 0", reason, len(contents))
    try:
        return make_document(text, input.domain, input.origin)
    except ValueError as error:
        return Reject(input.path, "byte 0", str(error), len(contents))


def _is_json_lines(text: str, text_key: str) -> bool:
    """Whether the first line is a record, which must not be learned as it is."""
    if not text.startswith("{"):
        return False
    try:
        record = json.loads(text.partition("\n")[0])
    except (ValueError, RecursionError):
        return False
    return isinstance(record, dict) and text_key in record
