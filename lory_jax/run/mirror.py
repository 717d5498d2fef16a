"""Checkpoints in an object store that Orbax cannot write: it writes to the cache, this copies.

A step is there when its `UPLOADED` is: the last object written, a list of the step's files.
"""

import json
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import jax
from etils import epath

from lory_jax.errors import InputError
from lory_jax.run.retention import Retention
from lory_jax.storage import Staging, fetch, is_inside, send, write_atomically

UPLOADED = "uploaded.json"


class Mirror:
    """The steps of a remote checkpoint directory, and a local directory to write and read them in.

    Attributes:
      local: where Orbax writes; empty at first, gone after `close`.
    """

    def __init__(self, remote: Path, keep: Retention | None):
        """`keep` says which steps stay in `remote`; None, as a reader, uploads nothing.

        Raises:
          InputError: there are several processes: each would see its own part of a checkpoint.
        """
        if jax.process_count() > 1:
            raise InputError(
                f"{remote}: an s3:// work directory takes one process, got {jax.process_count()}; "
                "several take gs://, a shared file system, or the bucket mounted as one"
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
        """Copies a step that Orbax has finished, in the background, and removes old ones.

        `losses` are validation losses by step, where known.
        """
        self.wait()
        self._running = self._pool.submit(self._upload, step, dict(losses))

    def download(self, step: int) -> None:
        """Copies a step to `local`, if it is not there.

        Raises:
          OSError: an object of it is missing.
        """
        target = self.local / str(step)
        if target.exists():
            return
        source = self._remote / str(step)
        unfinished = self.local / f"{step}.download"
        for name in json.loads((source / UPLOADED).read_text("utf-8")):
            if not is_inside(name):
                raise ValueError(f"{UPLOADED} names {name!r}, which is outside the checkpoint")
            fetch(source / name, unfinished / name)
        unfinished.replace(target)

    def close(self) -> None:
        """Waits for the upload under way and removes `local`."""
        self.wait()
        self._pool.shutdown()
        self._staging.close()

    def wait(self) -> None:
        """Waits for the upload under way; raises what failed there."""
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
            # Later ones are damaged, as in `Checkpoints.save`.
            kept = self._keep.kept({s: losses.get(s) for s in stored if s <= step})
            for gone in stored - kept:
                self._remove(gone)

    def _remove(self, step: int) -> None:
        directory = self._remote / str(step)
        if directory.is_dir():
            (directory / UPLOADED).unlink(missing_ok=True)
            epath.Path(str(directory)).rmtree()
