"""Runs of the tiny recipe in this process, which imports and compiles once for all of them."""

import time
from pathlib import Path
from typing import Any

from lory_jax.config import load_config
from lory_jax.run.directory import RunDirectory
from lory_jax.training import loop
from lory_jax.training.monitoring.goodput import Goodput
from lory_jax.training.restore import restore_or_initialize
from lory_jax.training.setup import setup


class NoSignal:
    """In the place of `StopRequest`, whose handlers belong to the process of a verb."""

    signal = 0


def train(
    site: Path, workdir: Path, *, experts: int = 4, init_from: tuple[Path, ...] = (), **fields: Any
) -> list[dict[str, Any]]:
    """Trains or resumes `workdir` on `site`/data, with `section__field` set; returns its metrics.

    The caller puts `NoSignal` in the place of `loop.StopRequest`.
    """
    overrides = [(name.replace("__", ".", 1), str(value)) for name, value in fields.items()]
    config = load_config(f"{site / 'tiny.py'}:experts={experts}", overrides)
    sources = tuple(map(RunDirectory, init_from))
    directory = RunDirectory(workdir)
    run = setup(config, site / "data", directory, Goodput(since=time.monotonic()), sources)
    trainer = loop.Trainer(run, restore_or_initialize(run))
    loop.finish(trainer, trainer.train())
    return directory.read_metrics()
