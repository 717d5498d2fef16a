"""Results of compiling, kept by content in the user's cache directory.

Compiling a step takes a minute, and what it finds depends only on what was compiled and on the
versions of the compilers. Files are written under a temporary name and moved into place, so that
several processes may share them and an interrupted one leaves none that is incomplete.
"""

import functools
import hashlib
import json
import os
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


def directory() -> Path:
    """Where results are kept: $LORY_PLAN_CACHE, or lory_jax/plan in the user's cache directory."""
    if "LORY_PLAN_CACHE" in os.environ:
        return Path(os.environ["LORY_PLAN_CACHE"])
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return cache / "lory_jax" / "plan"


def load(kind: str, key: str) -> Any:
    """What was saved under a key; None if there is nothing."""
    try:
        return json.loads(_path(kind, key).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def save(kind: str, key: str, value: Any) -> None:
    """Keeps a value that JSON can hold."""
    path = _path(kind, key)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    with os.fdopen(handle, "w") as file:
        json.dump(value, file)
    os.replace(temporary, path)


def _path(kind: str, key: str) -> Path:
    return directory() / kind / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"


@functools.cache
def versions() -> dict[str, str | None]:
    """Of the packages that decide what a program compiles to."""
    found: dict[str, str | None] = {}
    for name in ("jax", "jaxlib", "libtpu"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found
