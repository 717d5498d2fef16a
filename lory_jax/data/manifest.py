"""`manifest.json`: what a prepared directory holds, how it was made, and the hash of every file.

`PreparedData` (data/prepared.py) reads it; only `prepare` writes it.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from lory_jax.data.instances import token_dtype
from lory_jax.errors import InputError
from lory_jax.json_text import parse_json
from lory_jax.storage import check_link, is_inside

MANIFEST_NAME = "manifest.json"
TOKENIZER_NAME = "tokenizer.json"
ORIGINS_NAME = "origins.json"
FORMAT_VERSION = 1
LONGEST_DIRECTORY_NAME = 200


@dataclass(frozen=True)
class Manifest:
    """The contents of `manifest.json`.

    Attributes:
      settings: the settings it was made with; the same settings on the same corpus give the same
        files.
      sequence_length: L; a record holds L + 1 tokens.
      vocab_size: the size of the vocabulary of `tokenizer.json`.
      counts: per split `instances`, `dropped_tokens` and `domains`: per domain `documents`,
        `tokens` (BOS and EOS included) and `bytes`, and for evaluation splits `instances`.
      similarity: how similar consecutive documents are, in similarity order and in random order.
      files: relative path to `{"sha256": ..., "bytes": ...}`.
      inputs: path, size and stamp of everything that was read; empty in older directories.
      dropped: how many documents were left out, by reason.
    """

    settings: dict[str, Any]
    sequence_length: int
    vocab_size: int
    counts: dict[str, Any]
    similarity: dict[str, Any]
    files: dict[str, dict[str, Any]]
    inputs: list[dict[str, Any]] = field(default_factory=list)
    dropped: dict[str, int] = field(default_factory=dict)

    @classmethod
    def from_json(cls, contents: bytes, path: Path) -> "Manifest":
        """Reads the bytes of a manifest.

        Args:
          contents: what the file holds.
          path: where it is, for the messages.

        Raises:
          InputError: the manifest is malformed, of another version, or names a file outside its
            directory.
        """
        try:
            fields = parse_json(contents, path)
            version = fields.pop("format_version")
            manifest = cls(**fields)
            _check_types(manifest)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(f"{path}: malformed ({error!r}); run prepare again") from None
        if version != FORMAT_VERSION:
            raise InputError(f"{path}: got format version {version}, must be {FORMAT_VERSION}")
        for name in manifest.files:
            if not is_inside(name):
                raise InputError(f"{path}: names {name!r}, which is outside the directory")
        return manifest

    @property
    def dtype(self) -> np.dtype:
        """The type of a token on disk."""
        return token_dtype(self.vocab_size)

    def names(self, prefix: str) -> list[str]:
        """Returns the files whose name begins with `prefix`, such as "train/", sorted."""
        return sorted(name for name in self.files if name.startswith(prefix))

    def verify(self, directory: Path, *, hashes: bool, prefix: str = "") -> None:
        """Checks that local files exist with the right size and, with `hashes`, the right SHA-256.

        Only files whose name begins with `prefix`, such as "train/", are checked.

        Raises:
          InputError: names the first file that is missing or differs, or is a link that leads out.
        """
        root = directory.resolve()
        for name in self.names(prefix):
            check_link(directory / name, root)
            _verify_file(directory / name, self.files[name], hashes)


def _check_types(manifest: Manifest) -> None:
    dictionaries = (
        *(manifest.settings, manifest.counts, manifest.similarity, manifest.files),
        manifest.dropped,
    )
    if not all(isinstance(value, dict) for value in (*dictionaries, *manifest.files.values())):
        raise TypeError("an object is missing")
    if not all({"sha256", "bytes"} <= entry.keys() for entry in manifest.files.values()):
        raise KeyError("sha256 or bytes of a file")
    if not all({"path", "size", "stamp"} <= entry.keys() for entry in manifest.inputs):
        raise KeyError("path, size or stamp of an input")
    if not isinstance(manifest.sequence_length, int) or not isinstance(manifest.vocab_size, int):
        raise TypeError("sequence_length and vocab_size are not integers")


def _verify_file(path: Path, entry: Mapping[str, Any], hashes: bool) -> None:
    if not path.is_file():
        raise InputError(f"{path}: missing; run prepare again into a new directory")
    size = path.stat().st_size
    if size != entry["bytes"]:
        raise InputError(
            f"{path}: truncated or damaged (found {size} bytes, the manifest says "
            f"{entry['bytes']}); run prepare again into a new directory"
        )
    if hashes and file_sha256(path) != entry["sha256"]:
        raise InputError(
            f"{path}: damaged (its SHA-256 is not the one in the manifest); "
            "run prepare again into a new directory"
        )


def describe_files(directory: Path) -> dict[str, dict[str, Any]]:
    """Returns hash and size of every file under `directory`, by relative path, sorted."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    return {
        path.relative_to(directory).as_posix(): {
            "sha256": file_sha256(path),
            "bytes": path.stat().st_size,
        }
        for path in paths
    }


def write_manifest(manifest: Manifest, directory: Path) -> None:
    """Writes `manifest.json`; call it last, since its presence marks the directory as complete."""
    contents = {"format_version": FORMAT_VERSION} | asdict(manifest)
    text = json.dumps(contents, indent=1, sort_keys=True, allow_nan=False) + "\n"
    temporary = directory / (MANIFEST_NAME + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(directory / MANIFEST_NAME)


def write_origins(directory: Path, origins: list[str]) -> None:
    """Writes the origin of every instance of a held-out domain beside its shards."""
    (directory / ORIGINS_NAME).write_text(json.dumps(origins, indent=0) + "\n", encoding="utf-8")


def domain_directory(domain: str) -> str:
    """Returns the directory name of a domain: percent-encoded, so that it is safe.

    No two domains share one. A name that is too long for a file system is cut; the hash of the
    domain follows, after a "%" that no encoded name can hold there.
    """
    if not domain:
        raise InputError("domain: got an empty name, must have at least one character")
    name = quote(domain, safe="+")
    if name.startswith("."):
        name = "%2E" + name[1:]
    if len(name) <= LONGEST_DIRECTORY_NAME:
        return name
    digest = hashlib.sha256(domain.encode()).hexdigest()[:32]
    return f"{name[: LONGEST_DIRECTORY_NAME - 40]}%sha256-{digest}"


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Returns "name: found x, wanted y" for every setting that differs, nested by dots."""
    lines = []
    for name in sorted(found.keys() | wanted.keys()):
        a, b = found.get(name), wanted.get(name)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            lines += [f"{name}.{line}" for line in differences(a, b)]
        elif a != b:
            lines.append(f"{name}: found {a!r}, wanted {b!r}")
    return lines


def file_sha256(path: Path) -> str:
    """Returns the SHA-256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
