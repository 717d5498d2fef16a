"""Checkpoints in an object store that Orbax cannot write to.

Orbax writes to the cache, and this module copies. `UPLOADED` lists the files of a step and is its
last object to be written: a step without it is incomplete.
"""

import json
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import jax
from etils import epath

from lory_jax.errors import InputError
from lory_jax.json_text import parse_json
from lory_jax.run.retention import Retention
from lory_jax.storage import Staging, fetch, is_inside, send, write_atomically

UPLOADED = "uploaded.json"


class Mirror:
    """The steps of a remote checkpoint directory, and a local directory for Orbax.

    Attributes:
      local: where Orbax reads and writes; empty at first, removed by `close`.
    """

    def __init__(self, remote: Path, keep: Retention | None):
        """`keep` says which steps are kept in `remote`; None is for readers, who upload nothing.

        Raises:
          InputError: there are several processes; each would see only its part of a checkpoint.
        """
        if jax.process_count() > 1:
            raise InputError(
                f"{remote}: a run directory on s3:// requires one process, got "
                f"{jax.process_count()}; several processes require gs://, a shared file system, or "
                "the bucket mounted as one"
            )
        self._remote, self._keep = remote, keep
        self._staging = Staging("checkpoints")
        self.local = self._staging.directory
        self._pool = ThreadPoolExecutor(1)
        self._running: Future[None] | None = None

    def steps(self) -> list[int]:
        """Steps uploaded completely, ascending."""
        self.wait()
        if not self._remote.is_dir():
            return []
        names = (path.name for path in self._remote.iterdir())
        return sorted(
            int(name)
            for name in names
            if name.isdigit() and (self._remote / name / UPLOADED).exists()
        )

    def upload(self, step: int, losses: Mapping[int, float | None]) -> None:
        """Copies a finished step in the background, and removes old ones.

        `losses` are the validation losses by step, where known.
        """
        self.wait()
        self._running = self._pool.submit(self._upload, step, dict(losses))

    def download(self, step: int) -> None:
        """Copies a step to `local` unless it is there already.

        Raises:
          OSError: an object of it is missing.
        """
        target = self.local / str(step)
        if target.exists():
            return
        source = self._remote / str(step)
        unfinished = self.local / f"{step}.download"
        for name in parse_json((source / UPLOADED).read_bytes(), source / UPLOADED):
            if not isinstance(name, str) or not is_inside(name):
                raise ValueError(f"{UPLOADED} names {name!r}, which is outside the checkpoint")
            fetch(source / name, unfinished / name)
        unfinished.replace(target)

    def close(self) -> None:
        """Waits for the upload in progress and removes `local`."""
        self.wait()
        self._pool.shutdown()
        self._staging.close()

    def wait(self) -> None:
        """Waits for the upload in progress; raises the error if it failed."""
        if self._running is not None:
            self._running.result()

    def _upload(self, step: int, losses: Mapping[int, float | None]) -> None:
        source, target = self.local / str(step), self._remote / str(step)
        self._remove(step)
        files = sorted(path for path in source.rglob("*") if path.is_file())
        names = [path.relative_to(source).as_posix() for path in files]
        for path, name in zip(files, names, strict=True):
            send(path, target / name)
        write_atomically(target / UPLOADED, json.dumps(names))
        stored = {int(path.name) for path in self._remote.iterdir() if path.name.isdigit()}
        if self._keep:
            # Later steps are damaged; `Checkpoints.save` removes them, too.
            kept = self._keep.kept({s: losses.get(s) for s in stored if s <= step})
            for gone in stored - kept:
                self._remove(gone)

    def _remove(self, step: int) -> None:
        directory = self._remote / str(step)
        if directory.is_dir():
            (directory / UPLOADED).unlink(missing_ok=True)
            epath.Path(str(directory)).rmtree()
