"""A Hugging Face `tokenizers` JSON file: text to ids and back, and bytes per token."""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from lory_jax.errors import InputError

BEGIN_AND_END = (
    ("<s>", "</s>"),
    ("<|begin_of_text|>", "<|end_of_text|>"),
    ("<bos>", "<eos>"),
    ("<|endoftext|>", "<|endoftext|>"),
)
SMALLEST_VOCABULARY = 256 + 2
UNUSED_PARTS = ("post_processor", "padding", "truncation")  # ignored parts of the JSON


class Tokenizer:
    """Text to token ids and back.

    Attributes:
      json_text: the JSON, exactly as it was read or trained.
      vocab_size: one more than the largest id, V.
      bos_id, eos_id: the ids that begin and end every document.
      sha256: hash of the JSON text, which is also that of the file `save` writes.
      token_bytes: int32 `[V]`, the UTF-8 bytes each id stands for; 0 for special tokens.
    """

    def __init__(self, json_text: str, name: str = "tokenizer"):
        """Reads the text of a `tokenizers` JSON; an `InputError` says that `name` is damaged."""
        self.json_text = json_text
        self._tokenizer, contents = _parse(json_text, name)
        added = self._tokenizer.get_added_tokens_decoder()
        special_ids = {token.content: id for id, token in added.items() if token.special}
        pair = next((p for p in BEGIN_AND_END if set(p) <= special_ids.keys()), None)
        if pair is None:
            accepted = ", ".join(" and ".join(dict.fromkeys(p)) for p in BEGIN_AND_END)
            raise InputError(
                f"{name}: has no special tokens that begin and end a document, requires {accepted}"
            )
        self.bos_id, self.eos_id = special_ids[pair[0]], special_ids[pair[1]]
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        self.sha256 = hashlib.sha256(json_text.encode()).hexdigest()
        to_bytes = _byte_level_bytes if _is_byte_level(contents) else _sentencepiece_bytes
        self._bytes_of_id = [b""] * self.vocab_size
        for token, id in vocabulary.items():
            if token not in special_ids:
                self._bytes_of_id[id] = to_bytes(token)
        self.token_bytes = np.array([len(b) for b in self._bytes_of_id], np.int32)

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Reads a tokenizer JSON; raises `InputError` if it is missing or damaged."""
        try:
            # newline="": the hash is of the bytes on disk.
            with open(path, encoding="utf-8", newline="") as file:
                return cls(file.read(), str(path))
        except OSError as error:
            raise InputError(f"{path}: cannot read the tokenizer ({error.strerror})") from None
        except UnicodeDecodeError:
            raise InputError(f"{path}: not a tokenizer JSON (not UTF-8 text)") from None

    def save(self, path: str | Path) -> None:
        """Writes the JSON text."""
        Path(path).write_bytes(self.json_text.encode())

    def same_ids(self, other: "Tokenizer") -> bool:
        """Returns whether both give every text the same ids, and every id the same text.

        They may differ in what `encode` never uses: special tokens that are put around a text,
        padding and truncation.
        """
        mine, others = (
            {key: part for key, part in json.loads(text).items() if key not in UNUSED_PARTS}
            for text in (self.json_text, other.json_text)
        )
        return mine == others

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text`, without BOS and EOS.

        A special token spelled out in the text is ordinary text.
        """
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns `encode` of every text; uses all cores."""
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Returns the text of `ids`; special tokens give no text, broken UTF-8 gives U+FFFD."""
        return self._tokenizer.decode([int(id) for id in ids], skip_special_tokens=True)

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """Returns the `token_bytes[ids].sum()` UTF-8 bytes that `ids` stand for."""
        return b"".join(self._bytes_of_id[id] for id in ids)


def _parse(json_text: str, name: str) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    try:
        contents = json.loads(json_text)
    except json.JSONDecodeError as error:
        raise InputError(f"{name}: not a tokenizer JSON ({error})") from None
    try:
        tokenizer = tokenizers.Tokenizer.from_str(json_text)
    except Exception as error:  # the library raises no more specific exception
        raise InputError(f"{name}: not a tokenizer JSON ({error})") from None
    # A file may ask for truncation or padding, which would drop or add tokens of a document.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer, contents


def _is_byte_level(contents: dict[str, Any]) -> bool:
    decoder = contents.get("decoder") or {}
    steps = decoder.get("decoders", [decoder])
    return any(step.get("type") == "ByteLevel" for step in steps)


def _byte_alphabet() -> dict[str, int]:
    """Returns the character that byte-level BPE writes for each byte, mapped to the byte.

    Printable Latin-1 stands for itself; the other bytes, in order, are U+0100, U+0101, ...
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


BYTE_OF_CHARACTER = _byte_alphabet()
BYTE_FALLBACK = re.compile(r"<0x([0-9A-F]{2})>")


def _byte_level_bytes(token: str) -> bytes:
    if all(character in BYTE_OF_CHARACTER for character in token):
        return bytes(BYTE_OF_CHARACTER[character] for character in token)
    return token.encode()


def _sentencepiece_bytes(token: str) -> bytes:
    if match := BYTE_FALLBACK.fullmatch(token):
        return bytes([int(match[1], 16)])
    return token.replace("▁", " ").encode()
