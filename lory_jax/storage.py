"""Storage of data and runs: local directories, or gs:// and s3:// addresses through etils.epath.

docs/storage.md says which part of a run requires a local copy, and why.
"""

import argparse
import contextlib
import errno
import fcntl
import hashlib
import importlib.util
import os
import shutil
import tempfile
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import cast

from lory_jax.errors import InputError

PACKAGES = {"gs": "gcsfs", "s3": "s3fs"}  # by scheme

CHUNK_BYTES = 16 * 2**20


class UnusablePath(InputError, argparse.ArgumentTypeError):
    """A path that cannot be used; argparse, too, prints its message."""


def storage_path(text: str | Path) -> Path:
    """Returns a local path, or an object store's address with the same methods; a flag's `type`.

    Remote paths have the methods of `pathlib.Path`, but the builtin `open` does not accept them:
    use `path.open`.

    Raises:
      UnusablePath: the package for the scheme is not installed, or the scheme is unknown.
    """
    head, separator, _ = str(text).partition("://")
    if not separator:
        return local_path(text)
    scheme = head.rpartition(",")[2]  # of the first address of several: "A,gs://B"
    if scheme not in PACKAGES:
        raise UnusablePath(
            f"{text}: got scheme {scheme}://, must be a directory, or an address at gs:// or s3://"
        )
    package = PACKAGES[scheme]
    if importlib.util.find_spec(package) is None:
        raise UnusablePath(f"{text}: requires the package {package}; pip install {package}")
    # Imported here so that commands start fast.
    from etils import epath

    return cast(Path, epath.Path(str(text)))


def local_path(text: str | Path) -> Path:
    """Returns a local path; a flag's `type`. A shell leaves the ~ of --flag=~/x as it is.

    Raises:
      UnusablePath: it is empty, holds a null character, or begins with the ~ of an unknown user.
    """
    try:
        if not str(text) or "\0" in str(text):
            raise UnusablePath(f"got {str(text)!r}, must be the path of a file or directory")
        return Path(text).expanduser()
    except RuntimeError:
        raise UnusablePath(f"got {str(text)!r}, which names the home of an unknown user") from None


def is_remote(path: str | Path) -> bool:
    """Whether a path is in an object store."""
    return "://" in str(path)


def is_inside(name: str) -> bool:
    """Whether a relative name, joined to a directory, stays below it."""
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and path.name != ""


def check_links(directory: Path, part: str = ".") -> None:
    """Raises `InputError` if a symbolic link in a local directory, or in a part, leads out of it.

    What was unpacked from an archive may hold such links: what is then read or written would be
    files elsewhere. The directory itself may be a link.
    """
    root = directory.resolve()
    check_link(directory / part, root)
    for folder, folders, files in os.walk(directory / part):
        for name in (*folders, *files):
            check_link(Path(folder, name), root)


def check_link(path: Path, root: Path) -> None:
    """`check_links` of one path below the resolved directory `root`."""
    try:
        is_outside = not path.resolve().is_relative_to(root)
    except RuntimeError:  # a loop of links
        is_outside = True
    if is_outside:
        raise InputError(f"{path}: a symbolic link that leads out of {root}; must stay inside it")


def cache_directory() -> Path:
    """Returns $LORY_CACHE (default: lory_jax in the user's cache directory), created if missing."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "lory_jax"
    directory = Path(os.environ.get("LORY_CACHE", default))
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def write_atomically(path: Path, contents: str | bytes) -> None:
    """Writes a file, text as UTF-8; readers see all of it or nothing."""
    data = contents.encode("utf-8") if isinstance(contents, str) else contents
    if is_remote(path):  # an object appears when its upload is complete
        path.write_bytes(data)
        return
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        with naming(path):
            temporary.write_bytes(data)
            temporary.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Errors of the system say what could not be written: those of a full disk name no file."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


def check_writable(path: Path, argument: str) -> None:
    """Raises `InputError`, with the argument's name, unless a file can be written at `path`.

    Its directory need not exist yet. Nothing is left behind. Object stores are not checked.
    """
    if is_remote(path):
        return
    directory = path.absolute().parent
    while not directory.exists():
        directory = directory.parent
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise InputError(f"{argument}: {path} cannot be written ({error.strerror})") from None


def fetch(source: Path, target: Path) -> None:
    """Copies a remote file to a local one, which appears only when it is complete."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f"{target.name}.tmp-{os.getpid()}")
    with source.open("rb") as reader, open(temporary, "wb") as writer:
        shutil.copyfileobj(reader, writer, CHUNK_BYTES)
    temporary.replace(target)


def send(source: Path, target: Path) -> None:
    """Copies a local file to a remote one."""
    with open(source, "rb") as reader, target.open("wb") as writer:
        shutil.copyfileobj(reader, writer, CHUNK_BYTES)


class Staging:
    """A temporary directory in the cache directory.

    It is removed by `close`, or when this object is deleted. If the process is killed, the next
    `Staging` of the same kind removes it, unless it has a name: then the next one of that name
    finds what is in it.
    """

    def __init__(self, kind: str, name: str | None = None):
        """Makes the directory; `name` may be any text, such as an address.

        Raises:
          InputError: another process uses the name.
        """
        parent = cache_directory() / kind
        parent.mkdir(parents=True, exist_ok=True)
        for leftover in sorted(parent.glob("tmp*.lock")):
            _remove_if_abandoned(leftover)
        if name is None:
            descriptor, path = tempfile.mkstemp(suffix=".lock", dir=parent)
        else:
            digest = hashlib.sha256(name.encode()).hexdigest()[:16]
            path = str(parent / f"kept-{digest}.lock")
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise InputError(f"{name}: another process of this machine writes it") from None
        self.directory = Path(path).with_suffix("")
        self.directory.mkdir(exist_ok=name is not None)
        self.close = weakref.finalize(self, _remove, Path(path), descriptor)


def _remove(lock: Path, descriptor: int) -> None:
    shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
    lock.unlink(missing_ok=True)
    os.close(descriptor)


def _remove_if_abandoned(lock: Path) -> None:
    """Removes a staging directory whose process died: nobody holds its lock."""
    try:
        descriptor = os.open(lock, os.O_RDWR)
    except FileNotFoundError:
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:  # in use
        os.close(descriptor)
        return
    _remove(lock, descriptor)


class Uploads:
    """Copies changed files of a local directory to a remote one, in the background."""

    def __init__(self, source: Path, target: Path, every_seconds: float = 60.0):
        self._source, self._target = source, target
        self._every_seconds = every_seconds
        self._sent: dict[Path, tuple[int, int]] = {}
        self._pool = ThreadPoolExecutor(1)
        self._running: Future[None] | None = None
        self._last = time.monotonic()

    def poll(self) -> None:
        """Starts a round of uploads if the last round began at least `every_seconds` ago."""
        if time.monotonic() - self._last >= self._every_seconds:
            self.start()

    def start(self) -> None:
        """Waits for the previous round, raises its error if any, and starts the next round."""
        self.wait()
        self._last = time.monotonic()
        self._running = self._pool.submit(self._send_changed)

    def wait(self) -> None:
        if self._running is not None:
            self._running.result()

    def close(self) -> None:
        """Uploads the remaining changes and ends the background thread."""
        self.start()
        self.wait()
        self._pool.shutdown()

    def _send_changed(self) -> None:
        for path in sorted(p for p in self._source.rglob("*") if p.is_file()):
            status = path.stat()
            stamp = (status.st_size, status.st_mtime_ns)
            if self._sent.get(path) != stamp:
                send(path, self._target / path.relative_to(self._source).as_posix())
                self._sent[path] = stamp
