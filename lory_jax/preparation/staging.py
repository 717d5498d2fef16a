"""The directory that `prepare` writes: it appears whole, or not at all."""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lory_jax.config import section_defaults
from lory_jax.data.manifest import MANIFEST_NAME, differences
from lory_jax.data.prepared import PreparedData
from lory_jax.errors import InputError


def is_prepared(out: Path, settings: dict[str, Any]) -> bool:
    """Returns whether `out` is complete, intact and made with these settings.

    Raises:
      InputError: `out` is neither prepared data nor new: it holds something else, was prepared with
        other settings, or is damaged.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if not (out / MANIFEST_NAME).is_file():
        raise InputError(
            f"out: {out} exists and has no {MANIFEST_NAME}; must be a new or empty directory, "
            "or one that prepare wrote"
        )
    data = PreparedData.open(out)
    # A field younger than the directory had its default.
    found = dict(data.manifest.settings)
    if "data" in found:
        found["data"] = section_defaults("data") | found["data"]
        found["data"].pop("mixture", None)  # says how `train` reads the directory
    if differs := differences(found, settings):
        raise InputError(
            f"out: {out} was prepared with other settings ({'; '.join(differs)}); "
            "choose another directory or remove it"
        )
    data.verify(hashes=True)
    return True


@contextlib.contextmanager
def staging_directory(out: Path) -> Iterator[Path]:
    """Yields an empty directory beside `out`, which becomes `out` unless an error is raised.

    Raises:
      InputError: it cannot be written, or another process writes it.
    """
    staging = out.with_name(out.name + ".tmp-prepare")
    try:
        staging.mkdir(parents=True, exist_ok=True)
        lock = os.open(staging, os.O_RDONLY)
    except OSError as error:
        raise InputError(f"out: cannot write {out} ({error.strerror})") from None
    try:
        # The lock ends with its process, however that ends, so what a killed process left behind
        # can be removed.
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise InputError(f"out: another prepare is writing {out}") from None
    for leftover in staging.iterdir():
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    try:
        yield staging
        staging.rename(out)
    except BaseException:
        shutil.rmtree(staging)
        raise
    finally:
        os.close(lock)
