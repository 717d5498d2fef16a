"""The work directory of `prepare`: tasks that read files, write files, and leave a marker.

    WORK/settings.json             what was asked for
    WORK/STAGE/00003/              what task 3 of a stage wrote
    WORK/STAGE/00003.json          its marker: the task is done and never runs again
    WORK/STAGE.json                the stage is complete

A task writes into a directory with a temporary name, renames it, and then writes its marker. In an
object store, whose objects appear whole, it uploads its files instead of renaming a directory.
What a task does depends on its number and on the files of earlier stages only, so any engine and
any number of workers write the same bytes.
"""

import contextlib
import ctypes
import fcntl
import hashlib
import json
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from lory_jax.data.manifest import file_sha256
from lory_jax.errors import InputError
from lory_jax.storage import is_remote, naming, send, storage_path, write_atomically

SETTINGS_NAME = "settings.json"
MOD = 2**64
LONG_SECONDS = 1.0  # a task that took longer used memory enough to return it


@dataclass
class Facts:
    """What a task says about its work in its marker.

    Attributes:
      rows: documents in its output.
      hash_sum: the sum of their 64-bit hashes, modulo 2^64.
      values: anything else that later stages, or the reader of the screen, need.
      say: lines for the screen.
    """

    rows: int = 0
    hash_sum: int = 0
    values: dict[str, Any] = field(default_factory=dict)
    say: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Stage:
    """A list of numbered tasks.

    Attributes:
      name: its name, in markers and flags.
      count: returns the number of tasks, from what earlier stages wrote.
      run: does task i, writing files into a local directory.
      describe: returns what task i reads, in words, for messages.
    """

    name: str
    count: Callable[["Work"], int]
    run: Callable[["Work", int, Path], Facts]
    describe: Callable[["Work", int], str] = lambda work, task: "the files of earlier stages"


class Work:
    """A work directory, local or in an object store."""

    def __init__(self, root: str | Path):
        self.root = storage_path(str(root))

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What was asked for."""
        return json.loads((self.root / SETTINGS_NAME).read_text("utf-8"))

    @property
    def data(self) -> dict[str, Any]:
        """The section `data` of the config."""
        return self.settings["data"]

    def directory(self, stage: str, task: int = 0) -> Path:
        """Returns where a task's output is."""
        return self.root / stage / f"{task:05d}"

    def marker_path(self, stage: str, task: int) -> Path:
        """Returns where a task's marker is."""
        return self.root / stage / f"{task:05d}.json"

    def marker(self, stage: str, task: int = 0) -> dict[str, Any]:
        """Returns the marker of a finished task."""
        return json.loads(self.marker_path(stage, task).read_text("utf-8"))

    def values(self, stage: str, task: int = 0) -> dict[str, Any]:
        """Returns what a finished task says in its marker beyond rows and sums."""
        return self.marker(stage, task)["values"]

    def pending(self, stage: Stage) -> list[int]:
        """Returns the tasks of a stage that have no marker."""
        count = stage.count(self)
        done = set()
        if (self.root / stage.name).exists():
            done = {path.name for path in (self.root / stage.name).glob("*.json")}
        return [task for task in range(count) if f"{task:05d}.json" not in done]

    def is_complete(self, stage: str) -> bool:
        """Whether all tasks of a stage are done."""
        return (self.root / f"{stage}.json").exists()

    def complete(self, stage: Stage) -> dict[str, Any]:
        """Writes the manifest of a stage whose tasks are all done, and returns it."""
        path = self.root / f"{stage.name}.json"
        if path.exists():
            return json.loads(path.read_text("utf-8"))
        markers = [self.marker(stage.name, task) for task in range(stage.count(self))]
        summary = {
            "tasks": len(markers),
            "rows": sum(marker["rows"] for marker in markers),
            "hash_sum": sum(marker["hash_sum"] for marker in markers) % MOD,
            "cpu_seconds": round(sum(marker["cpu_seconds"] for marker in markers), 2),
            "peak_mib": max((marker["peak_mib"] for marker in markers), default=0),
        }
        write_atomically(path, json.dumps(summary, indent=1) + "\n")
        return summary


def run_task(root: str, stage: Stage, task: int) -> int:
    """Runs a task unless it has its marker; returns its rows."""
    work = Work(root)
    with naming(work.directory(stage.name, task)), _alone(work, stage.name, task):
        if work.marker_path(stage.name, task).exists():
            return work.marker(stage.name, task)["rows"]
        return _run(work, stage, task)


@contextlib.contextmanager
def _alone(work: Work, stage: str, task: int) -> Iterator[None]:
    """Waits until no other process runs the task.

    A worker may outlive an engine that was killed. In an object store, which has no locks, two
    processes would upload the same bytes.
    """
    if is_remote(work.root):
        yield
        return
    (work.root / stage).mkdir(parents=True, exist_ok=True)
    with open(work.root / stage / f"{task:05d}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # ends with its process
        yield


def _run(work: Work, stage: Stage, task: int) -> int:
    path = work.marker_path(stage.name, task)
    parent = None if is_remote(work.root) else work.root / stage.name
    directory = Path(tempfile.mkdtemp(prefix=f"{task:05d}.tmp-", dir=parent))
    directory.chmod(0o755)
    started, cpu = time.monotonic(), time.process_time()
    _forget_peak()
    try:
        facts = stage.run(work, task, directory)
        files = sorted(p for p in directory.rglob("*") if p.is_file())
        marker = {
            "rows": facts.rows,
            "hash_sum": facts.hash_sum % MOD,
            "sha256": {p.relative_to(directory).as_posix(): file_sha256(p) for p in files},
            "seconds": round(time.monotonic() - started, 3),
            "cpu_seconds": round(time.process_time() - cpu, 3),
            "peak_mib": _peak_mib(),
            "versions": _versions(),
            "values": facts.values,
            "say": facts.say,
        }
        _publish(directory, work.directory(stage.name, task))
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    if time.monotonic() - started > LONG_SECONDS:
        _return_freed_memory()
    write_atomically(path, json.dumps(marker, indent=1) + "\n")
    return facts.rows


def find_stage(stages: tuple[Stage, ...], name: str) -> Stage:
    """Returns the stage of a name; raises `InputError` with the names if there is none."""
    for stage in stages:
        if stage.name == name:
            return stage
    names = ", ".join(stage.name for stage in stages)
    raise InputError(f"stage: got {name!r}, must be one of {names}")


def hash_sum(digests_N: Any) -> int:
    """Returns the sum of 64-bit hashes modulo 2^64."""
    return int(digests_N.sum(dtype="uint64")) if len(digests_N) else 0


def _publish(directory: Path, target: Path) -> None:
    if is_remote(target):
        for path in (p for p in directory.rglob("*") if p.is_file()):
            send(path, target / path.relative_to(directory).as_posix())
        return
    if target.exists():  # its process died between the rename and the marker
        shutil.rmtree(target)
    os.rename(directory, target)


def _return_freed_memory() -> None:
    """Gives back to the system what a task freed, so that the next one starts without it.

    Only glibc can be asked to; elsewhere the allocator decides.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _forget_peak() -> None:
    """Lets the peak of this process's memory begin anew, so that a marker tells that of its task.

    Where the system cannot (only Linux can), it is the peak since the process began.
    """
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def _peak_mib() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // 2**20 if sys.platform == "darwin" else peak // 2**10


def _versions() -> Mapping[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    versions = {"python": sys.version.split()[0]}
    for name in ("numpy", "scann", "scikit-learn", "tokenizers"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def settings_hash(settings: Mapping[str, Any]) -> str:
    """Returns a short hash of settings, which names a work directory."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
