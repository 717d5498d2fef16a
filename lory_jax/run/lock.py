"""A lock, so that only one process at a time trains in a run directory."""

import fcntl
import json
import os
import socket
import sys
import time
from pathlib import Path
from typing import IO

from lory_jax.errors import InputError
from lory_jax.run.lease import Lease
from lory_jax.storage import is_remote

LOCK = "lock"
PATIENCE_SECONDS = 2.0  # doctor holds the lock for an instant, and so does a dying process


class WorkdirLock:
    """Holds the lock of a run directory for as long as this process lives.

    The kernel keeps the lock (flock), so it is released when its process ends, however that
    happens. The text of the file only says who holds it. In an object store, which has no locks, a
    lease stands for it.
    """

    def __init__(self, workdir: Path):
        """Takes the lock.

        Raises:
          InputError: another process holds it; the message says which.
        """
        if is_remote(workdir):
            self._lease: Lease | None = Lease(workdir)
            return
        self._lease = None
        self._file = open(workdir / LOCK, "a+", encoding="utf-8")  # noqa: SIM115 (see above)
        deadline = time.monotonic() + PATIENCE_SECONDS
        while (taken := _try(self._file, fcntl.LOCK_EX)) is False:
            if time.monotonic() > deadline:
                raise InputError(f"{workdir}: another process trains in it ({_owner(self._file)})")
            time.sleep(0.05)
        if taken is None:
            warn_without_lock(f"{workdir} is on a file system without locks")
        self._file.truncate(0)
        owner = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%c")}
        self._file.write(json.dumps(owner))
        self._file.flush()

    def release(self) -> None:
        """Lets another process train; the end of this process does the same."""
        if self._lease is not None:
            self._lease.release()
        else:
            self._file.close()


def holder(workdir: Path) -> str | None:
    """Who trains in a run directory at the moment, or None; writes nothing."""
    path = workdir / LOCK
    if is_remote(workdir) or not path.exists():
        return None
    with open(path, encoding="utf-8") as file:
        return _owner(file) if _try(file, fcntl.LOCK_SH) is False else None


def _try(file: IO[str], kind: int) -> bool | None:
    """Whether the lock was free and is now held; None where the file system has no locks."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # ENOLCK, ENOTSUP
        return None
    return True


def _owner(file: IO[str]) -> str:
    file.seek(0)
    try:
        owner = json.loads(file.read())
        return f"process {owner['pid']} on {owner['host']}, since {owner['since']}"
    except (ValueError, KeyError, TypeError):
        return "a process that is just starting"


def warn_without_lock(why: str) -> None:
    print(f"note: {why}; do not start a second run in it", file=sys.stderr, flush=True)
