"""The inputs of a corpus: what they are, how they are grouped into tasks, and how one is read."""

import hashlib
import os
import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lory_jax.errors import InputError
from lory_jax.preparation.documents import Document
from lory_jax.preparation.sources.corpus import read_json_lines, read_text_file, read_tfds

TASK_BYTES = 64 * 2**20
NAMED = 3  # inputs that a message about a changed corpus names


@dataclass(frozen=True)
class Input:
    """Something that is read as a whole.

    Attributes:
      path: a file, or the source itself where it is no file.
      size: bytes, 0 if it is no file.
      stamp: time of its last change in nanoseconds, or a version; with `size`, it tells whether the
        input is what it was.
    """

    path: str
    size: int
    stamp: str


def list_inputs(source: str) -> list[Input]:
    """Returns the inputs of a source, in the order in which they are read.

    Raises:
      InputError: the source does not exist, or is of no known kind.
    """
    if source == "python":
        return [Input(source, 0, platform.python_version())]
    if source.startswith("tfds:"):
        return [Input(source, 0, "")]
    path = Path(source)
    if path.is_dir():
        hidden = (p for p in sorted(path.rglob("*")) if not _is_hidden(p.relative_to(path)))
        return [_describe(p) for p in hidden if p.is_file()]
    if path.is_file() and path.suffix == ".jsonl":
        return [_describe(path)]
    raise InputError(
        f"source: got {source!r}, must be python, an existing directory, an existing .jsonl "
        "file, or tfds:NAME/config:split"
    )


def group_into_tasks(inputs: Sequence[Input]) -> list[list[int]]:
    """Groups inputs into tasks of about 64 MiB; the grouping depends on nothing but the inputs."""
    groups: list[list[int]] = []
    size = 0
    for i, each in enumerate(inputs):
        if not groups or size + each.size > TASK_BYTES:
            groups.append([])
            size = 0
        groups[-1].append(i)
        size += each.size
    return groups


def read_input(source: str, each: Input, max_domain_bytes: int, seed: int) -> Iterator[Document]:
    """Yields the documents of an input, in natural order.

    Raises:
      InputError: it is malformed, or changed since it was planned.
    """
    if source == "python":
        from lory_jax.preparation.sources.python_installation import read_python_installation

        yield from read_python_installation(max_domain_bytes, seed)
    elif source.startswith("tfds:"):
        yield from read_tfds(source)
    else:
        path = Path(each.path)
        if not path.is_file() or _describe(path) != each:
            raise InputError(f"{path}: changed while it was being prepared; prepare it again")
        if path.suffix == ".jsonl":
            yield from read_json_lines(path)
        else:
            yield read_text_file(Path(source), path)


def to_records(inputs: Sequence[Input]) -> list[dict[str, Any]]:
    """Returns the inputs as the manifest holds them."""
    return [asdict(each) for each in inputs]


def changes(found: Sequence[dict[str, Any]], wanted: Sequence[dict[str, Any]]) -> str:
    """Returns in words how a corpus differs from what it was, or "" if it does not."""
    before, now = ({each["path"]: each for each in records} for records in (found, wanted))
    kinds = {
        "new": [path for path in now if path not in before],
        "missing": [path for path in before if path not in now],
        "changed": [path for path in now if path in before and now[path] != before[path]],
    }
    if not any(kinds.values()):
        return ""
    counts = ", ".join(f"{len(paths)} {kind}" for kind, paths in kinds.items() if paths)
    named = [path for paths in kinds.values() for path in paths][:NAMED]
    return f"{counts}: {', '.join(named)}{', …' if sum(map(len, kinds.values())) > NAMED else ''}"


def digest(records: Sequence[dict[str, Any]]) -> str:
    """Returns a hash of what the inputs are."""
    lines = (f"{r['path']}\n{r['size']}\n{r['stamp']}\n" for r in records)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _is_hidden(relative: Path) -> bool:
    return any(part.startswith(".") for part in relative.parts)


def _describe(path: Path) -> Input:
    status = os.stat(path)
    return Input(str(path), status.st_size, str(status.st_mtime_ns))
