"""From sources to inputs: the files, and parts of large files, that hold the documents.

`list_inputs` looks at names, sizes and, of large tables, at their index. What it returns decides
how the work is divided, so it depends on the sources only.
"""

import glob
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from lory_jax.errors import InputError
from lory_jax.preparation.sources import arrow_files, json_files, tfds
from lory_jax.preparation.sources.formats import (
    ACCEPTED,
    IGNORED_NAMES,
    domain_of_records,
    format_of,
)
from lory_jax.preparation.sources.streams import describe, describe_object, file_system
from lory_jax.storage import is_remote

PART_BYTES = 256 * 2**20
WILDCARD = re.compile(r"[*?\[]")
SAVED_DATASET = ("state.json", "dataset_info.json")  # beside the files of `save_to_disk`


@dataclass(frozen=True)
class Input:
    """A file, or a part of one, that can be read on its own, any number of times.

    Attributes:
      path: a local path, an address, `tfds:…`, or `python`.
      kind: "text", "jsonl", "json", "csv", "tsv", "parquet", "arrow", "tfds" or "python".
      compression: "gz", "zst" or "".
      size: bytes of the whole file.
      stamp: changes when the contents do: a time, an entity tag, or a version.
      domain: that of documents that name none.
      origin: that of a text; "" for records.
      first, end: what to read, from the first number up to the other: bytes of JSON lines, row
        groups of Parquet, record batches of Arrow, examples of TFDS; without an end, everything.
    """

    path: str
    kind: str
    compression: str
    size: int
    stamp: str
    domain: str
    origin: str = ""
    first: int = 0
    end: int | None = None

    @property
    def part(self) -> tuple[int, int] | None:
        """What to read, or None for everything."""
        return None if self.end is None else (self.first, self.end)


class File(NamedTuple):
    """A file that was found: its address, its path below the source, its size and stamp."""

    path: str
    below: PurePosixPath
    size: int
    stamp: str


def list_inputs(sources: Sequence[str], part_bytes: int = PART_BYTES) -> list[Input]:
    """Returns the inputs of all sources, sorted by path within each source.

    Args:
      sources: each is a file, a directory, a pattern with `*`, `?`, `[…]` or `**`, at a local path
        or at gs:// or s3://, `tfds:NAME/config:split`, or `python`.
      part_bytes: larger files are divided into parts of about this size, if their format allows.

    Returns:
      The inputs; a file that several sources or links reach is listed once.

    Raises:
      InputError: a source is missing or has no file, or a file is of an unknown kind.
    """
    inputs: list[Input] = []
    seen: set[str] = set()
    for source in sources:
        for found in _list_source(source, part_bytes):
            key = found.path if is_special(found) else real_path(found.path)
            if key not in seen:
                seen.add(key)
                inputs += _parts(found, part_bytes)
    return inputs


def is_special(input: Input) -> bool:
    """Whether an input is no file."""
    return input.kind in ("tfds", "python")


def real_path(path: str) -> str:
    """The one path of a file that several links may reach."""
    return path if is_remote(path) else os.path.realpath(path)


def _list_source(source: str, part_bytes: int) -> Iterator[Input]:
    if source == "python":
        from lory_jax.preparation.sources.python_installation import version

        yield Input("python", "python", "", 0, version(), "python")
        return
    if source.startswith("tfds:"):
        size, stamp = tfds.describe(source)
        yield Input(source, "tfds", "", size, stamp, tfds.domain_of(source))
        return
    root, files = _find_remote(source) if is_remote(source) else _find_local(source)
    files = [file for file in files if file.below.name not in IGNORED_NAMES]
    files = _without_metadata(source, files)
    _refuse_unknown(source, files)
    if not files:
        raise InputError(f"source: {source} holds no file")
    for file in sorted(files, key=lambda file: file.below.parts):
        yield _to_input(file, root)


def _to_input(file: File, root: str) -> Input:
    kind, compression, stem = format_of(file.below.name)
    parts = file.below.parts
    if kind == "text":
        domain, origin = parts[0] if len(parts) > 1 else root, "/".join(parts[:2])
        # A name that is not UTF-8 is escaped, so that it can be hashed and printed.
        domain, origin = map(_printable, (domain, origin))
    else:
        domain, origin = domain_of_records(stem, parts[-2] if len(parts) > 1 else root), ""
    return Input(file.path, kind, compression, file.size, file.stamp, domain, origin)


def _printable(name: str) -> str:
    return name.encode(errors="backslashreplace").decode()


def _parts(input: Input, part_bytes: int) -> list[Input]:
    """Divides a large input; what a part holds does not depend on the other parts."""
    if input.kind == "json" and not input.compression and input.size > part_bytes:
        input = replace(input, kind=json_files.sniff(input.path))
    if input.kind == "tfds":
        bounds = tfds.divide(input.path, part_bytes)
    elif input.size <= part_bytes or input.compression:
        return [input]
    elif input.kind == "jsonl":
        bounds = [*range(0, input.size, part_bytes), input.size]
    elif input.kind in ("parquet", "arrow"):
        bounds = arrow_files.divide(input.path, input.kind, part_bytes)
    else:
        return [input]
    parts = [replace(input, first=a, end=b) for a, b in itertools.pairwise(bounds)]
    return parts or [input]


# ---------------------------------------------------------------- finding files


def _find_local(source: str) -> tuple[str, list[File]]:
    """Returns the name of the folder of a source, and the files below it."""
    path = Path(source)
    if path.is_file():
        return path.resolve().parent.name, [_local_file(path, path.name)]
    if path.is_dir():
        return path.resolve().name, list(_walk(path, path, set()))
    if not WILDCARD.search(source):
        raise InputError(
            f"source: got {source!r}, must be an existing file or directory, a pattern, python, or "
            "tfds:NAME/config:split"
        )
    root = Path(_fixed_part(source))
    found = [Path(name) for name in glob.glob(source, recursive=True)]
    files = [_local_file(p, p.relative_to(root).as_posix()) for p in found if p.is_file()]
    return root.resolve().name, files


def _walk(root: Path, directory: Path, seen: set[str]) -> Iterator[File]:
    """Yields the files below a directory, in order of name; each directory is entered once."""
    real = os.path.realpath(directory)
    if real in seen:
        return
    seen.add(real)
    with os.scandir(directory) as entries:
        names = sorted(entry.name for entry in entries if not entry.name.startswith("."))
    for name in names:
        path = directory / name
        if path.is_dir():
            yield from _walk(root, path, seen)
        elif path.is_file():
            yield _local_file(path, path.relative_to(root).as_posix())


def _local_file(path: Path, below: str) -> File:
    return File(str(path), PurePosixPath(below), *describe(str(path)))


def _find_remote(source: str) -> tuple[str, list[File]]:
    scheme, _, bare = source.partition("://")
    bare = bare.rstrip("/")
    system = file_system(source)
    is_pattern = WILDCARD.search(bare) is not None
    found = system.glob(bare, detail=True) if is_pattern else system.find(bare, detail=True)
    found = {name: info for name, info in found.items() if info["type"] == "file"}
    if not found:
        raise InputError(f"source: got {source!r}, which holds no file")
    root = _fixed_part(bare) if is_pattern else bare
    if set(found) == {bare}:  # the source is one object
        root = bare.rpartition("/")[0]
    files = []
    for name, info in found.items():
        below = PurePosixPath(name).relative_to(root)
        if not any(part.startswith(".") for part in below.parts):
            files.append(File(f"{scheme}://{name}", below, *describe_object(info)))
    return PurePosixPath(root).name, files


def _fixed_part(pattern: str) -> str:
    """The directory of a pattern that comes before its first wildcard."""
    head = pattern[: WILDCARD.search(pattern).start()]  # type: ignore[union-attr]
    return head.rpartition("/")[0] or ("/" if head.startswith("/") else "")


def _without_metadata(source: str, files: list[File]) -> list[File]:
    """Of directories that `save_to_disk` wrote, keeps the tables only."""
    names = {str(file.below) for file in files}
    folders = {str(file.below.parent) for file in files}
    saved = {f for f in folders if all(str(PurePosixPath(f, n)) in names for n in SAVED_DATASET)}
    for file in files:
        if file.below.name == "dataset_dict.json":
            splits = [f for f in saved if PurePosixPath(f).parent == file.below.parent]
            if len(splits) > 1:
                listed = ", ".join(sorted(PurePosixPath(f).name for f in splits))
                raise InputError(
                    f"source: {source} holds the splits {listed} of a data set; must be one of "
                    "them, such as its directory train"
                )
    dictionaries = {str(PurePosixPath(f).parent) for f in saved}
    return [
        file
        for file in files
        if not (str(file.below.parent) in saved and not _is_table(file.below.name))
        and not (file.below.name == "dataset_dict.json" and str(file.below.parent) in dictionaries)
    ]


def _is_table(name: str) -> bool:
    """Whether a file of a saved data set holds its rows; `cache-*.arrow` are leftovers of maps."""
    return name.endswith(".arrow") and not name.startswith("cache-")


def _refuse_unknown(source: str, files: list[File]) -> None:
    unknown = sorted(str(f.below) for f in files if format_of(f.below.name).kind == "unknown")
    if unknown:
        listed = ", ".join(unknown[:3]) + (", …" if len(unknown) > 3 else "")
        raise InputError(
            f"source: {source} holds {len(unknown)} files of a kind that cannot be read "
            f"({listed}); must be {ACCEPTED}; move them elsewhere or give a pattern, such as "
            f"{source.rstrip('/')}/**/*.txt"
        )
