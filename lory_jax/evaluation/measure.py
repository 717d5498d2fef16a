"""A trained model on its mesh, and the losses it has on sets of instances."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from lory_jax.api import Model
from lory_jax.console import progress
from lory_jax.data.manifest import TOKENIZER_NAME
from lory_jax.data.tokenizer import Tokenizer
from lory_jax.errors import InputError
from lory_jax.evaluation.held_out import batches_of
from lory_jax.evaluation.perplexity import token_losses
from lory_jax.parallel import make_mesh
from lory_jax.run.directory import load_params, read_config
from lory_jax.training.step import make_loss_step


class Run(NamedTuple):
    """A model to be measured, over all devices of the mesh, in batches of a size."""

    workdir: Path
    model: Model
    mesh: jax.sharding.Mesh
    batch_size: int

    def replace(self, **fields: Any) -> "Run":
        """The same parameters under a model config that differs in these fields."""
        old = self.model
        config = dataclasses.replace(old.config, **fields)
        return self._replace(model=Model(config, old.params, old.tokenizer, old.step))


def open_run(workdir: Path, batch_size: int | None = None) -> Run:
    """The newest intact checkpoint of a run; `batch_size` is as in training unless given."""
    mesh = make_mesh(data=1, fsdp=0, tensor=1)
    config, params, step = load_params(workdir, mesh)
    batch_size = batch_size or read_config(workdir)["train"]["global_batch_size"]
    if batch_size % jax.device_count():
        raise InputError(
            f"--batch_size: got {batch_size}, takes a multiple of the {jax.device_count()} devices"
        )
    tokenizer = Tokenizer.load(workdir / TOKENIZER_NAME)
    return Run(workdir, Model(config, params, tokenizer, step), mesh, batch_size)


def losses(
    run: Run, sets: dict[str, np.ndarray], label: str, routing: str | None
) -> dict[str, np.ndarray]:
    """Losses in nats of every domain, `[N, L]`, batch by batch under a progress line.

    `routing` "segment" and "prompt" take the first T tokens of every row as its prompt; None routes
    exactly as in training.
    """
    if not sets:
        return {}
    config = run.model.config
    loss_step = make_loss_step(config, run.mesh, routing, prompt_length=config.segment_length)
    batches = batches_of(sets, run.batch_size)
    found: dict[str, list[np.ndarray]] = {domain: [] for domain in sets}
    with jax.set_mesh(run.mesh):
        for domain, rows in progress(batches, len(batches), label, "batches"):
            found[domain].append(
                token_losses(
                    loss_step, run.model.params, rows, run.batch_size, run.mesh, config.batch_axis
                )
            )
    return {domain: np.concatenate(parts) for domain, parts in found.items()}


def as_trained(run: Run) -> str:
    """The routing at inference that is training's own on positions >= T."""
    return "prompt" if run.model.config.routing == "prefix" else "segment"


def perplexity(nll: np.ndarray) -> float:
    """exp of the mean loss."""
    return float(np.exp(np.mean(nll, dtype=np.float64)))
