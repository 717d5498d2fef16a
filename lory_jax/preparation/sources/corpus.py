"""Reads documents from a Python installation, text files, JSON lines or TFDS."""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lory_jax.errors import InputError
from lory_jax.json_text import parse_json
from lory_jax.preparation.documents import Document, split_long
from lory_jax.preparation.sources.python_installation import read_python_installation
from lory_jax.schema import shorten

JSON_LINES = (".jsonl", ".ndjson")
# Files that hold documents beside markup, or are packed; read as text, the markup would be learnt.
TABLES = (".arrow", ".csv", ".feather", ".h5", ".npy", ".npz", ".parquet", ".pkl", ".tsv")
PACKED = (".bz2", ".gz", ".lz4", ".tar", ".tgz", ".xz", ".zip", ".zst")


def read_corpus(
    source: str, *, min_bytes: int, max_bytes: int, max_domain_bytes: int, seed: int
) -> list[Document]:
    """Reads, cleans and caps a corpus.

    Args:
      source: `python` (this installation), a directory of UTF-8 text files (domain: top folder), a
        `.jsonl`, `.ndjson` or `.json` file (`text`, optional `domain` and `source`), or
        `tfds:NAME/config:split`.
      min_bytes: shorter documents are dropped.
      max_bytes: longer documents are cut at empty lines.
      max_domain_bytes: bytes kept per domain, in documents that the seed picks; 0 keeps all.
      seed: decides which documents are kept.

    Returns:
      Documents without exact duplicates, grouped by domain and origin, in natural order.

    Raises:
      InputError: the source is missing, empty, malformed or not UTF-8.
    """
    pieces = [
        Document(text, document.domain, document.origin)
        for document in _read(source, max_domain_bytes, seed)
        for text in split_long(document.text, max_bytes)
    ]
    documents = _without_duplicates([d for d in pieces if len(d.text.encode()) >= min_bytes])
    if not documents:
        raise InputError(
            f"{source}: empty corpus: {len(pieces)} documents, none of at least {min_bytes} bytes "
            "(config.data.min_document_bytes)"
        )
    documents = _cap(documents, max_domain_bytes, seed)
    return sorted(documents, key=lambda document: (document.domain, document.origin))


def _read(source: str, max_domain_bytes: int, seed: int) -> Iterator[Document]:
    if source == "python":
        yield from read_python_installation(max_domain_bytes, seed)
        return
    if source.startswith("tfds:"):
        yield from read_tfds(source)
        return
    path = Path(source)
    reader = JSON_READERS.get(path.suffix.lower())
    if path.is_dir():
        yield from read_directory(path)
    elif path.is_file() and reader:
        yield from reader(path)
    else:
        raise InputError(
            f"source: got {source!r}, must be python, an existing directory, an existing "
            f"{', '.join(JSON_READERS)} file, or tfds:NAME/config:split"
        )


def read_directory(root: Path) -> Iterator[Document]:
    """Yields the text of every file below `root`.

    The domain is the top folder, the origin the file or folder below it.

    Hidden files are skipped. JSON files are read as documents, whatever the case of their suffix.
    Files that hold data in another form are refused: their markup is not text.
    """
    for path in sorted(root.rglob("*")):
        parts = path.relative_to(root).parts
        if not path.is_file() or any(part.startswith(".") for part in parts):
            continue
        suffix = path.suffix.lower()
        if reader := JSON_READERS.get(suffix):
            yield from reader(path)
            continue
        if suffix in TABLES + PACKED:
            raise InputError(
                f"{path}: {suffix} files are not text; must be text or one of "
                f"{', '.join(JSON_READERS)}: convert it or move it elsewhere"
            )
        domain = parts[0] if len(parts) > 1 else root.resolve().name
        # A name that is not UTF-8 is escaped, so that it can be hashed and printed.
        domain, origin = map(_printable, (domain, "/".join(parts[:2])))
        yield Document(_read_text(path), domain, origin)


def read_json_lines(path: Path) -> Iterator[Document]:
    """Yields one document per line, an object with `text` and, optionally, `domain` and `source`.

    The domain is the file's name by default. A document without a source is an origin of its own.
    """
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            fields = parse_json(line, where)
        except InputError:
            fields = None
        if not _is_document(fields):
            raise InputError(f"{where}: got {line[:40]!r}, must be {A_DOCUMENT}")
        yield _from_fields(fields, path.stem, where)


def read_json(path: Path) -> Iterator[Document]:
    """Yields the documents of a `.json` file: an array of them, one, or JSON lines."""
    text = _read_text(path)
    try:
        value = parse_json(text, path)
    except InputError:
        first = next((line for line in text.split("\n") if line.strip()), "")
        if first.strip().startswith("{") and first.strip().endswith("}"):
            yield from read_json_lines(path)
            return
        raise
    for number, fields in enumerate(value if isinstance(value, list) else [value], start=1):
        where = f"{path}: document {number}"
        if not _is_document(fields):
            raise InputError(
                f"{where}: got {shorten(repr(fields), 40)}, must be {A_DOCUMENT}; move the file "
                "elsewhere if it holds no documents"
            )
        yield _from_fields(fields, path.stem, where)


A_DOCUMENT = "a JSON object with a string `text`"
JSON_READERS = {**dict.fromkeys(JSON_LINES, read_json_lines), ".json": read_json}


def _is_document(fields: Any) -> bool:
    return isinstance(fields, dict) and isinstance(fields.get("text"), str)


def read_tfds(source: str) -> Iterator[Document]:
    """Yields the examples of `tfds:NAME/config:split`, without TensorFlow.

    The data set must be prepared in the array_record format. Its examples must have a feature
    `text` and may have `domain` and `source`.
    """
    try:
        import tensorflow_datasets as tfds
    except ImportError:
        raise InputError(f"{source}: requires pip install tensorflow-datasets") from None
    name, _, split = source.removeprefix("tfds:").partition(":")
    try:
        examples = tfds.builder(name).as_data_source(split=split or "train")
    except (
        tfds.core.DatasetNotFoundError,
        ValueError,
        AssertionError,
        NotImplementedError,
    ) as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(
            f"{source}: cannot be read ({reason}); must be a data set prepared with "
            "download_and_prepare(file_format='array_record') in $TFDS_DATA_DIR"
        ) from None
    for example in examples:
        if "text" not in example:
            raise InputError(
                f"{source}: got features {sorted(example)}, must include a feature `text`"
            )
        fields = {
            name: value.decode() if isinstance(value := example[name], bytes) else str(value)
            for name in ("text", "domain", "source")
            if name in example
        }
        yield _from_fields(fields, name.split("/")[0], where=source)


def _from_fields(fields: dict[str, Any], default_domain: str, where: str) -> Document:
    text = fields["text"]
    try:
        "".join(map(str, fields.values())).encode()
    except UnicodeEncodeError as error:
        bad = ascii(error.object[error.start])
        raise InputError(
            f"{where}: got {bad}, half of a surrogate pair; must be valid Unicode"
        ) from None
    origin = fields.get("source") or hashlib.sha256(text.encode()).hexdigest()
    return Document(text, str(fields.get("domain") or default_domain), str(origin))


def _printable(name: str) -> str:
    return name.encode(errors="backslashreplace").decode()


def _read_text(path: Path) -> str:
    """A file's text with line ends as "\\n", without a byte-order mark."""
    contents = path.read_bytes()
    try:
        return contents.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: not UTF-8 at byte {error.start} (0x{contents[error.start]:02x}); convert it "
            "or move it elsewhere"
        ) from None


def _without_duplicates(documents: Sequence[Document]) -> list[Document]:
    """Keeps the first of documents that are equal apart from white space at their ends."""
    seen: set[bytes] = set()
    kept = []
    for document in documents:
        digest = hashlib.sha256(document.text.strip().encode()).digest()
        if digest not in seen:
            seen.add(digest)
            kept.append(document)
    return kept


def _cap(documents: Sequence[Document], max_domain_bytes: int, seed: int) -> list[Document]:
    """Fills each domain with documents that the seed picks, and keeps their natural order."""
    if not max_domain_bytes:
        return list(documents)

    def rank(i: int) -> bytes:
        return hashlib.sha256(f"{seed}:{documents[i].text}".encode()).digest()

    sizes: Counter[str] = Counter()
    kept = set()
    for i in sorted(range(len(documents)), key=rank):
        if sizes[documents[i].domain] < max_domain_bytes:
            sizes[documents[i].domain] += len(documents[i].text.encode())
            kept.add(i)
    return [document for i, document in enumerate(documents) if i in kept]
