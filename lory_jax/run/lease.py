"""A lease on a run directory in an object store, so that only one run at a time writes there.

Object stores have no locks that end with a process. A lease is an object that its holder creates
only if there is none, and writes anew every few seconds. Another process watches it: if it changes,
its holder is alive, and if it stays as it is for longer than a holder ever waits, its holder is
gone. So no two clocks are compared.
"""

import atexit
import contextlib
import json
import os
import socket
import sys
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from lory_jax.errors import InputError
from lory_jax.json_text import parse_object

LEASE = "lease.json"
EXPIRY_SECONDS = 60.0
RENEWAL_SECONDS = 10.0
SETTLING_SECONDS = 1.0


class Lease:
    """Holds the lease of a run directory until this process ends.

    A process that finds that another one took its lease, because it could not renew it for too
    long, ends at once: it must not write any more.
    """

    def __init__(
        self, workdir: Path, expiry: float = EXPIRY_SECONDS, renewal: float = RENEWAL_SECONDS
    ):
        """Takes the lease, which needs up to `expiry` seconds if a process of elsewhere was killed.

        Raises:
          InputError: another process holds it; the message says which.
        """
        import fsspec

        self._workdir, self._expiry, self._renewal = workdir, expiry, renewal
        self._store, self._path = fsspec.core.url_to_fs(str(workdir / LEASE))
        self._owner = {
            "id": uuid.uuid4().hex,
            "host": socket.gethostname(),
            "machine": _machine(),
            "pid": os.getpid(),
            "since": time.strftime("%c"),
        }
        self._renewals = 0
        self._ended = threading.Event()
        while not self._create():
            self._wait_for_holder()
        threading.Thread(target=self._renew, daemon=True, name="lease").start()
        atexit.register(self._release_at_exit)

    def release(self) -> None:
        """Gives the lease up, if it is still ours."""
        if self._ended.is_set():
            return
        self._ended.set()
        atexit.unregister(self._release_at_exit)
        if self._is_ours(self._read()):
            self._store.rm_file(self._path)

    def _release_at_exit(self) -> None:
        # While Python ends, the store's library may refuse; the lease then expires by itself.
        with contextlib.suppress(OSError, RuntimeError):
            self.release()

    def _create(self) -> bool:
        try:
            self._store.pipe_file(self._path, self._contents(), mode="create")
        except FileExistsError:
            return False
        # Two processes may have found the same lease expired; the second to create one remains.
        time.sleep(SETTLING_SECONDS)
        return self._is_ours(self._read())

    def _wait_for_holder(self) -> None:
        """Returns when the lease is free; `InputError` as soon as its holder shows itself alive."""
        first = self._read()
        if first and _is_dead(first):
            self._remove(first)
            return
        deadline = time.monotonic() + self._expiry
        if first:
            print(
                f"note: {self._workdir}: {_described(first)} held it; waiting up to "
                f"{self._expiry:.0f} s to see whether it still does",
                file=sys.stderr,
                flush=True,
            )
        while first and time.monotonic() < deadline:
            time.sleep(self._renewal / 4)
            now = self._read()
            if now and now != first:
                raise InputError(
                    f"{self._workdir}: another process trains in it ({_described(now)})"
                )
            if not now:
                return
        self._remove(first)

    def _remove(self, stale: dict[str, Any]) -> None:
        if self._read() == stale:
            self._store.rm_file(self._path)

    def _renew(self) -> None:
        while not self._ended.wait(self._renewal):
            try:
                held = self._read()
                if self._is_ours(held):
                    self._renewals += 1
                    self._store.pipe_file(self._path, self._contents())
                    continue
            except OSError:  # the store cannot be reached for a while
                continue
            if self._ended.is_set():
                return
            print(
                f"error: {self._workdir}: {_described(held)} took it over, because this process "
                f"could not renew its lease for {self._expiry:.0f} s",
                file=sys.stderr,
                flush=True,
            )
            os._exit(InputError.status)

    def _contents(self) -> bytes:
        return json.dumps(self._owner | {"renewals": self._renewals}).encode()

    def _read(self) -> dict[str, Any]:
        """What the lease says; empty if there is none."""
        self._store.invalidate_cache()
        try:
            return parse_object(self._store.cat_file(self._path), self._path)
        except FileNotFoundError:
            return {}
        except InputError:
            return {"host": "an unknown host"}  # half of a write, or somebody else's file

    def _is_ours(self, held: dict[str, Any]) -> bool:
        return held.get("id") == self._owner["id"]


def _machine() -> str:
    """Names this machine, since its start, and the processes that see each other's ids."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""


def _is_dead(held: dict[str, Any]) -> bool:
    """Whether the holder was a process of this machine that is no more."""
    if not held.get("machine") or held["machine"] != _machine():
        return False
    return isinstance(held.get("pid"), int) and not Path(f"/proc/{held['pid']}").exists()


def _described(held: dict[str, Any]) -> str:
    return (
        f"process {held.get('pid', '?')} on {held.get('host', '?')}, since {held.get('since', '?')}"
    )
