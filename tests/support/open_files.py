"""Watches which files Python opens and changes, through its audit events."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate"}
CHANGES |= {"os.chmod", "os.chown", "os.utime", "shutil.rmtree", "shutil.move"}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# What the interpreter and libraries read at any time, and what is no file.
INSTALLATION = (sys.prefix, sys.base_prefix, os.path.dirname(os.__file__), "/proc", "/sys")

_directory: str | None = None
_found: list[str] = []
_is_installed = False


@contextlib.contextmanager
def reads_only_inside(directory: Path) -> Iterator[None]:
    """Raises `AssertionError` at the end if anything was written, or read outside the directory.

    Links are followed to the file that they name. Files of the Python installation may be read.
    The audit hook stays for the rest of the process; outside of this context it does nothing.
    """
    global _directory, _is_installed
    if not _is_installed:
        sys.addaudithook(_hook)
        _is_installed = True
    _found.clear()
    _directory = os.path.realpath(directory)
    try:
        yield
    finally:
        _directory = None
    assert not _found, _found


def _hook(event: str, arguments: tuple) -> None:
    if _directory is None or (event != "open" and event not in CHANGES):
        return
    path = arguments[0]
    if not isinstance(path, str | bytes | os.PathLike):
        return  # a file descriptor, which was opened before
    writes = event in CHANGES or (isinstance(arguments[2], int) and bool(arguments[2] & WRITES))
    real = os.path.realpath(os.fsdecode(path))
    may_be_read = any(_is_below(real, top) for top in (_directory, *INSTALLATION))
    if not _is_below(real, "/dev") and (writes or not may_be_read):
        _found.append(f"{event} {real}")


def _is_below(path: str, directory: str) -> bool:
    return path == directory or path.startswith(directory + os.sep)
