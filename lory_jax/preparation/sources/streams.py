"""Opens an input, local or in an object store, as a stream of its uncompressed bytes."""

import contextlib
import gzip
import importlib
import io
import os
import sys
import zlib
from collections.abc import Iterator
from typing import IO, Any, cast

from lory_jax.errors import InputError
from lory_jax.storage import is_remote, storage_path

BUFFER_BYTES = 1 << 20


@contextlib.contextmanager
def open_stream(path: str, compression: str = "") -> Iterator[IO[bytes]]:
    """Opens a file; only an uncompressed one can seek."""
    with contextlib.ExitStack() as stack:
        raw: Any
        if is_remote(path):
            remote = stack.enter_context(storage_path(path).open("rb"))
            raw = io.BufferedReader(cast(io.RawIOBase, remote), BUFFER_BYTES)
        else:
            raw = stack.enter_context(open(path, "rb", buffering=BUFFER_BYTES))
        if compression == "gz":
            raw = stack.enter_context(gzip.open(raw, "rb"))
        elif compression == "zst":
            raw = stack.enter_context(zstd(path).open(raw, "rb"))
        yield raw


def zstd(path: str) -> Any:
    """The module of Zstandard: of the standard library from Python 3.14 on, before that a copy."""
    name = "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd"
    try:
        return importlib.import_module(name)
    except ImportError:
        raise InputError(
            f"{path}: requires the package backports.zstd; pip install backports.zstd"
        ) from None


def damage_errors(compression: str) -> tuple[type[Exception], ...]:
    """What is raised while a damaged compressed file is read."""
    if compression == "gz":
        return (EOFError, gzip.BadGzipFile, zlib.error)
    if compression == "zst":
        return (EOFError, zstd("zst").ZstdError)
    return ()


def describe(path: str) -> tuple[int, str]:
    """Returns the size of a file and a stamp that changes with its contents.

    The stamp is the time of the last change in nanoseconds, or an object's entity tag.
    """
    if not is_remote(path):
        status = os.stat(path)
        return status.st_size, str(status.st_mtime_ns)
    return describe_object(file_system(path).info(path))


def describe_object(info: dict[str, Any]) -> tuple[int, str]:
    """Returns `describe` of an object from what the store says about it."""
    stamp = next((info[k] for k in ("etag", "ETag", "md5Hash", "LastModified") if info.get(k)), "")
    return int(info["size"]), str(stamp).strip('"')


def file_system(address: str) -> Any:
    """The fsspec file system of an address, which lists many objects in one request."""
    storage_path(address)  # says what must be installed, or that the scheme is unknown
    import fsspec

    # Without its cache of listings, which would hide that an object changed.
    return fsspec.filesystem(address.partition("://")[0], use_listings_cache=False)
