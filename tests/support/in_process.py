"""Runs of the tiny recipe in this process, which imports and compiles once for all of them."""

import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lory_jax.config import load_config
from lory_jax.data.prepared import PreparedData
from lory_jax.model.config import ModelConfig
from lory_jax.run.checkpoints import Checkpoints
from lory_jax.run.directory import RunDirectory
from lory_jax.run.phases import EXPERTS
from lory_jax.training import loop
from lory_jax.training.monitoring.goodput import Goodput
from lory_jax.training.restore import restore_or_initialize
from lory_jax.training.setup import setup
from tests.support.models import params_of
from tests.support.tiny import write_recipe


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


def write_run(workdir: Path, data: Path, experts: int = 4, **model: str) -> Path:
    """A work directory of the tiny recipe, as `train` leaves it, with decided routers."""
    recipe = write_recipe(workdir.parent)
    overrides = [(f"model.{name}", value) for name, value in model.items()]
    config = load_config(f"{recipe}:experts={experts}", overrides)
    RunDirectory(workdir).open_for_training(config.to_dict(), PreparedData.open(data))
    params = params_of(ModelConfig(**config.model))
    checkpoints = Checkpoints(workdir / "checkpoints", keep=1)
    checkpoints.save(jax.device_put({"step": np.int32(7), "params": params}), EXPERTS)
    checkpoints.close()
    return workdir
