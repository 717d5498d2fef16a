"""A Hugging Face `tokenizers` JSON file: text to ids and back, and bytes per token."""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from lory_jax.data.special_tokens import SPECIAL_TOKENS_NAME, SpecialTokens, declared
from lory_jax.errors import InputError
from lory_jax.json_text import parse_object

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
      special: what begins and ends a document.
      is_declared: whether `special` was declared, rather than known by the names of the tokens; it
        then lies in a file beside the JSON.
      vocab_size: one more than the largest id, V.
      sha256: hash of the JSON text, which is also that of the file `save` writes.
      token_bytes: int32 `[V]`, the UTF-8 bytes each id stands for; 0 for special tokens.
    """

    def __init__(
        self, json_text: str, name: str = "tokenizer", special: SpecialTokens | None = None
    ):
        """Reads the text of a `tokenizers` JSON; an `InputError` says that `name` is damaged.

        Without `special`, the special tokens must have one of the usual pairs of names.
        """
        self.json_text = json_text
        self._tokenizer, contents = _parse(json_text, name)
        added = self._tokenizer.get_added_tokens_decoder()
        ids_of_added = {token.content: id for id, token in added.items()}
        special_ids = {token.content: id for id, token in added.items() if token.special}
        self.is_declared = special is not None
        self.special = special or _by_name(special_ids, name)
        _check_ids(self.special, added, name)
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        self.sha256 = hashlib.sha256(json_text.encode()).hexdigest()
        self._is_byte_level = _is_byte_level(contents)
        self._textless = {self.bos_id, *self.eos_ids, *special_ids.values()}
        self._bytes_of_id = [b""] * self.vocab_size
        to_bytes = _token_to_bytes(contents)
        unknown = _unknown_token(contents)
        for token, id in vocabulary.items():
            if token in ids_of_added:
                # The text of an added token is matched as it is, and so it is what it stands for.
                self._bytes_of_id[id] = b"" if id in self._textless else token.encode()
            elif token != unknown:
                self._bytes_of_id[id] = to_bytes(token)
        self.token_bytes = np.array([len(b) for b in self._bytes_of_id], np.int32)

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Reads what `save` wrote; raises `InputError` if it is missing or damaged."""
        beside = Path(path).with_name(SPECIAL_TOKENS_NAME)
        special = None
        if beside.is_file():
            special = SpecialTokens.from_json(_read(beside), str(beside))
        return cls(_read(path), str(path), special)

    @classmethod
    def load_foreign(
        cls, path: str | Path, bos_id: int | None = None, eos_id: int | None = None
    ) -> "Tokenizer":
        """Reads a tokenizer JSON with the special tokens that the files beside it declare.

        Args:
          path: the JSON, in a Hugging Face directory, a run, prepared data, or alone.
          bos_id, eos_id: override what is declared.

        Raises:
          InputError: a file is damaged, an id is that of an ordinary token, or nothing says which
            tokens begin and end a document.
        """
        path = Path(path)
        json_text = _read(path)
        if bos_id is None and eos_id is None and (path.parent / SPECIAL_TOKENS_NAME).is_file():
            return cls.load(path)
        special = _declared_beside(path, _parse(json_text, str(path))[0], bos_id, eos_id)
        return cls(json_text, str(path), special)

    @property
    def bos_id(self) -> int:
        """The id that begins every document."""
        return self.special.bos_id

    @property
    def eos_id(self) -> int:
        """The id that ends every document."""
        return self.special.eos_ids[0]

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The ids that end a generated text; `eos_id` is the first."""
        return self.special.eos_ids

    @property
    def identity(self) -> str:
        """A hash of everything that decides the ids of a document."""
        if not self.is_declared:
            return self.sha256
        return hashlib.sha256((self.json_text + self.special.to_json()).encode()).hexdigest()

    def save(self, path: str | Path) -> None:
        """Writes the JSON text and, if they were declared, the special tokens beside it."""
        Path(path).write_bytes(self.json_text.encode())
        if self.is_declared:
            text = self.special.to_json()
            Path(path).with_name(SPECIAL_TOKENS_NAME).write_text(text, encoding="utf-8")

    def same_ids(self, other: "Tokenizer") -> bool:
        """Returns whether both give every text the same ids, and every id the same text.

        They may differ in what `encode` never uses: special tokens that are put around a text,
        padding and truncation.
        """
        mine, others = (
            {key: part for key, part in json.loads(text).items() if key not in UNUSED_PARTS}
            for text in (self.json_text, other.json_text)
        )
        same_borders = (self.bos_id, self.eos_id) == (other.bos_id, other.eos_id)
        return mine == others and same_borders

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
        if self._is_byte_level:
            return self.decode_bytes(ids).decode("utf-8", errors="replace")
        with_text = [int(id) for id in ids if int(id) not in self._textless]
        return self._tokenizer.decode(with_text, skip_special_tokens=True)

    def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
        """Returns the `token_bytes[ids].sum()` UTF-8 bytes that `ids` stand for."""
        return b"".join(self._bytes_of_id[id] for id in ids)

    def lost_bytes(self, texts: Sequence[str], ids: Sequence[Sequence[int]]) -> int:
        """Returns how many bytes of texts have no token in their `ids`.

        What a normaliser rewrites is not lost: "ﬁ" may become "fi".
        """
        normalizer = self._tokenizer.normalizer
        lost = 0
        for text, of_text in zip(texts, ids, strict=True):
            found = int(self.token_bytes[np.asarray(of_text, int)].sum())
            if found < len(text.encode()):
                kept = normalizer.normalize_str(text) if normalizer else text
                lost += max(0, len(kept.replace("▁", " ").encode()) - found)
        return lost


def _read(path: str | Path) -> str:
    try:
        # newline="": the hash is of the bytes on disk.
        with open(path, encoding="utf-8-sig", newline="") as file:
            return file.read()
    except OSError as error:
        raise InputError(f"{path}: cannot read the tokenizer ({error.strerror})") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: not a tokenizer JSON (not UTF-8 text)") from None


# ---------------------------------------------------------------- special tokens


def _by_name(special_ids: dict[str, int], name: str) -> SpecialTokens:
    pair = next((p for p in BEGIN_AND_END if set(p) <= special_ids.keys()), None)
    if pair is None:
        accepted = ", ".join(" and ".join(dict.fromkeys(p)) for p in BEGIN_AND_END)
        raise InputError(
            f"{name}: has no special tokens that begin and end a document by name ({accepted}), "
            "and no config.json beside it says which do; requires bos_id and eos_id"
        )
    return SpecialTokens(special_ids[pair[0]], (special_ids[pair[1]],))


def _check_ids(special: SpecialTokens, added: dict[int, Any], name: str) -> None:
    ids = {"bos_id": special.bos_id, "pad_id": special.pad_id}
    for what, id in [*ids.items(), *(("eos_id", id) for id in special.eos_ids)]:
        if id is not None and id not in added:
            raise InputError(
                f"{what}: got {id}, which is not a special token of {name}; must be one of "
                f"{_first(sorted(added))}"
            )


def _declared_beside(
    path: Path, tokenizer: tokenizers.Tokenizer, bos_id: int | None, eos_id: int | None
) -> SpecialTokens | None:
    """What the files beside a tokenizer JSON declare; None if its names say the same."""
    found = declared(path.parent)
    added = tokenizer.get_added_tokens_decoder()
    special_ids = {token.content: id for id, token in added.items() if token.special}
    ids = {token.content: id for id, token in added.items()}
    by_name = {field: ids.get(token) for field, token in found["names"].items()}
    if bos_id is None:
        bos_id = found["bos_token_id"]
    if bos_id is None:
        bos_id = by_name.get("bos_token")
    eos_ids = (eos_id,) if eos_id is not None else found["eos_token_id"]
    if not eos_ids and by_name.get("eos_token") is not None:
        eos_ids = (by_name["eos_token"],)
    if bos_id is None or not eos_ids:
        usual = _by_name(special_ids, str(path))
        bos_id, eos_ids = (usual.bos_id if bos_id is None else bos_id), eos_ids or usual.eos_ids
    pad_id = found["pad_token_id"] if found["pad_token_id"] in added else by_name.get("pad_token")
    if pad_id == eos_ids[0]:
        pad_id = None  # EOS pads where there is nothing else
    special = SpecialTokens(bos_id, tuple(eos_ids), pad_id, found["chat_template"])
    names_suffice = any(
        pair[0] in special_ids and pair[1] in special_ids for pair in BEGIN_AND_END
    ) and special == _by_name(special_ids, str(path))
    return None if names_suffice else special


def _first(ids: list[int], count: int = 20) -> str:
    return ", ".join(map(str, ids[:count])) + (", ..." if len(ids) > count else "")


# ---------------------------------------------------------------- the JSON


def _parse(json_text: str, name: str) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    try:
        contents = parse_object(json_text, name)
    except InputError as error:
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


def _token_to_bytes(contents: dict[str, Any]) -> Callable[[str], bytes]:
    """What turns a token of the model into the bytes that it stands for."""
    if _is_byte_level(contents):
        return _byte_level_bytes
    model = contents["model"]
    prefix = model.get("continuing_subword_prefix") or ""
    suffix = model.get("end_of_word_suffix") or ""
    return lambda token: _sentencepiece_bytes(token.removeprefix(prefix).removesuffix(suffix))


def _unknown_token(contents: dict[str, Any]) -> str | None:
    """The token that stands for text which has none, and so for no bytes."""
    model = contents["model"]
    if model.get("unk_id") is not None:  # Unigram
        return str(model["vocab"][model["unk_id"]][0])
    unknown = model.get("unk_token")
    return unknown if isinstance(unknown, str) else None
