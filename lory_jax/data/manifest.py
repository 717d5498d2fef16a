"""`manifest.json`: what a prepared directory holds, how it was made, and the hash of every file."""

import fcntl
import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from lory_jax.console import progress
from lory_jax.data.instances import token_dtype
from lory_jax.data.tokenizer import Tokenizer
from lory_jax.errors import InputError
from lory_jax.storage import cache_directory, fetch, is_inside, is_remote, storage_path

MANIFEST_NAME = "manifest.json"
TOKENIZER_NAME = "tokenizer.json"
FORMAT_VERSION = 1
LONGEST_DIRECTORY_NAME = 200


@dataclass(frozen=True)
class Manifest:
    """A prepared directory.

    Attributes:
      settings: what was asked for; the same settings on the same corpus give the same files.
      sequence_length: L; a record holds L + 1 tokens.
      vocab_size: of `tokenizer.json`.
      counts: per split `instances`, `dropped_tokens` and `domains`: per domain `documents`,
        `tokens` (BOS and EOS included) and `bytes`, and for evaluation splits `instances`.
      similarity: what the order of the documents achieved, similar against random.
      files: relative path to `{"sha256": ..., "bytes": ...}`.
    """

    settings: dict[str, Any]
    sequence_length: int
    vocab_size: int
    counts: dict[str, Any]
    similarity: dict[str, Any]
    files: dict[str, dict[str, Any]]

    @property
    def dtype(self) -> np.dtype:
        """The type of a token on disk."""
        return token_dtype(self.vocab_size)

    def shards(self, directory: Path, prefix: str) -> list[Path]:
        """Returns the shards under `prefix`, such as "train/", in order."""
        names = [name for name in self.files if name.startswith(prefix)]
        return [directory / name for name in sorted(names)]


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
    """Writes `manifest.json`; call it last, its presence says that the directory is complete."""
    contents = {"format_version": FORMAT_VERSION} | asdict(manifest)
    text = json.dumps(contents, indent=1, sort_keys=True, allow_nan=False) + "\n"
    temporary = directory / (MANIFEST_NAME + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(directory / MANIFEST_NAME)


def read_manifest(directory: str | Path) -> Manifest:
    """Reads the manifest of a prepared directory.

    Raises:
      InputError: the directory is missing or not prepared, or the manifest is malformed, of
        another version, or names a file outside the directory.
    """
    directory = storage_path(directory)
    path = directory / MANIFEST_NAME
    if not is_remote(directory) and not directory.is_dir():
        raise InputError(f"{directory}: no such directory; make it with python -m lory_jax.prepare")
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
        version = contents.pop("format_version")
        manifest = Manifest(**contents)
        _check_types(manifest)
    except FileNotFoundError:
        raise InputError(
            f"{directory}: has no {MANIFEST_NAME}: not prepared, or prepare was interrupted"
        ) from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{path}: malformed ({error!r}); run prepare again") from None
    if version != FORMAT_VERSION:
        raise InputError(f"{path}: got format version {version}, takes {FORMAT_VERSION}")
    for name in manifest.files:
        if not is_inside(name):
            raise InputError(f"{path}: names {name!r}, which is outside the directory")
    return manifest


def _check_types(manifest: Manifest) -> None:
    dictionaries = (manifest.settings, manifest.counts, manifest.similarity, manifest.files)
    if not all(isinstance(value, dict) for value in (*dictionaries, *manifest.files.values())):
        raise TypeError("an object is missing")
    if not all({"sha256", "bytes"} <= entry.keys() for entry in manifest.files.values()):
        raise KeyError("sha256 or bytes of a file")
    if not isinstance(manifest.sequence_length, int) or not isinstance(manifest.vocab_size, int):
        raise TypeError("sequence_length and vocab_size are not integers")


def verify_files(
    manifest: Manifest, directory: str | Path, *, hashes: bool, prefix: str = ""
) -> None:
    """Checks that files are there with the right size and, with `hashes`, the right SHA-256.

    Only those whose name begins with `prefix`, such as "train/".

    Raises:
      InputError: names the first file that is missing or differs.
    """
    for name, entry in manifest.files.items():
        if not name.startswith(prefix):
            continue
        path = Path(directory) / name
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
                f"{path}: damaged (its SHA-256 is not the manifest's); "
                "run prepare again into a new directory"
            )


def local_files(manifest: Manifest, directory: str | Path, prefix: str) -> Path:
    """Where the files whose name begins with `prefix` can be opened: ArrayRecord reads local files.

    That is `directory` itself, or, if it is remote, a copy in the cache. Copied files are checked
    by their SHA-256 and kept for later runs; the processes of one host share them.

    Raises:
      InputError: a remote file is missing or damaged, or the disk of the cache is too small.
    """
    if not is_remote(directory):
        return Path(directory)
    key = hashlib.sha256(json.dumps(manifest.files, sort_keys=True).encode()).hexdigest()[:16]
    copy = cache_directory() / "data" / key
    copy.mkdir(parents=True, exist_ok=True)
    with open(copy / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        missing = [
            name
            for name in sorted(manifest.files)
            if name.startswith(prefix) and not (copy / name).is_file()
        ]
        _check_space(copy, sum(manifest.files[name]["bytes"] for name in missing))
        label = f"copying {directory}"
        for name in progress(missing, len(missing), label, "files") if missing else []:
            _fetch_verified(storage_path(directory) / name, copy / name, manifest.files[name])
    return copy


def _check_space(directory: Path, needed: int) -> None:
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise InputError(
            f"{directory}: {free:,} bytes are free, the data take {needed:,}; set LORY_CACHE to a "
            "directory on a larger disk"
        )


def _fetch_verified(source: Path, target: Path, entry: Mapping[str, Any]) -> None:
    unverified = target.with_name(target.name + ".unverified")
    try:
        fetch(source, unverified)
    except FileNotFoundError:
        raise InputError(f"{source}: missing; copy the prepared directory again") from None
    if file_sha256(unverified) != entry["sha256"]:
        unverified.unlink()
        raise InputError(f"{source}: damaged (its SHA-256 is not the manifest's); copy it again")
    unverified.replace(target)


def load_tokenizer(manifest: Manifest, directory: str | Path) -> Tokenizer:
    """Reads the prepared directory's tokenizer; raises `InputError` unless it is the manifest's."""
    tokenizer = Tokenizer.load(local_files(manifest, directory, TOKENIZER_NAME) / TOKENIZER_NAME)
    expected = manifest.files.get(TOKENIZER_NAME, {}).get("sha256")
    if tokenizer.sha256 != expected:
        raise InputError(
            f"{storage_path(directory) / TOKENIZER_NAME}: does not match {MANIFEST_NAME} "
            f"(SHA-256 {tokenizer.sha256[:12]}…, takes {str(expected)[:12]}…): "
            "the shards were made with another tokenizer"
        )
    return tokenizer


def check_model_fits(manifest: Manifest, *, sequence_length: int, vocab_size: int) -> None:
    """Raises `InputError` unless a model of these sizes can read the prepared instances."""
    if sequence_length != manifest.sequence_length:
        raise InputError(
            f"config.model.sequence_length: got {sequence_length}, the prepared instances "
            f"take {manifest.sequence_length}"
        )
    if vocab_size < manifest.vocab_size:
        raise InputError(
            f"config.model.vocab_size: got {vocab_size}, the prepared tokenizer takes at least "
            f"{manifest.vocab_size}"
        )


def domain_directory(domain: str) -> str:
    """Returns the directory name of a domain: percent-encoded, so it is safe and can be undone."""
    name = quote(domain, safe="+")
    if name.startswith("."):
        name = "%2E" + name[1:]
    if not 0 < len(name) <= LONGEST_DIRECTORY_NAME:
        raise InputError(
            f"domain {domain[:40]!r}: its directory name has {len(name)} characters, "
            f"takes 1 to {LONGEST_DIRECTORY_NAME}"
        )
    return name


def summary(manifest: Manifest) -> str:
    """Returns a table of the tokens per domain and split, and how alike neighbours are."""
    domains = sorted({name for split in manifest.counts.values() for name in split["domains"]})
    nothing = {"tokens": 0, "bytes": 0}
    lines = [f"{'tokens':<24}" + "".join(f"{split:>14}" for split in manifest.counts)]
    for domain in domains:
        found = [split["domains"].get(domain, nothing) for split in manifest.counts.values()]
        tokens, size = (sum(counts[key] for counts in found) for key in ("tokens", "bytes"))
        row = "".join(f"{counts['tokens']:>14,}" for counts in found)
        lines.append(f"{domain:<24}{row}   {size / tokens:.2f} bytes/token")
    instances = "".join(f"{split['instances']:>14,}" for split in manifest.counts.values())
    lines.append(f"{'instances':<24}{instances}")
    train = manifest.counts["train"]
    documents = sum(counts["documents"] for counts in train["domains"].values())
    lines.append(
        f"train: {documents / train['instances']:.1f} documents per instance of "
        f"{manifest.sequence_length} tokens, median document {train['median_document_tokens']:g}"
    )
    for order in ("similar", "random"):
        if order in manifest.similarity:
            figures = manifest.similarity[order]
            lines.append(
                f"{order} order: mean cosine of consecutive documents {figures['mean_cosine']}, "
                f"same domain inside an instance {figures['same_domain_rate']}"
            )
    return "\n".join(lines)


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
