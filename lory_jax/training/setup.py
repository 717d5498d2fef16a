"""Everything that a training process opens before it has a state."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from lory_jax.console import say
from lory_jax.data.batches import TrainingBatches
from lory_jax.data.prepared import PreparedData
from lory_jax.errors import ConfigError
from lory_jax.model.config import ModelConfig
from lory_jax.model.flops import parameter_counts, peak_flops
from lory_jax.parallel import check_batch, make_mesh
from lory_jax.run.checkpoints import Checkpoints
from lory_jax.run.directory import RunDirectory
from lory_jax.run.lock import WorkdirLock
from lory_jax.run.retention import Retention
from lory_jax.storage import is_remote
from lory_jax.training.initialization_from import check_sources
from lory_jax.training.monitoring.goodput import Goodput
from lory_jax.training.monitoring.signals import Agreement, Wishes
from lory_jax.training.optimizer import Optimizer, make_optimizer
from lory_jax.training.phases import Phases, count_dense_steps
from lory_jax.training.validation import sets_to_validate


@dataclass(frozen=True)
class Setup:
    """What stays the same while a process trains.

    Attributes:
      directory: what the run has on disk.
      init_from: the runs to start from; none, for a run from scratch.
      lock: keeps other processes out of the run directory as long as it is referenced.
    """

    config: ConfigDict
    model_config: ModelConfig
    mesh: Mesh
    directory: RunDirectory
    init_from: tuple[RunDirectory, ...]
    batches: TrainingBatches
    validation_sets: Mapping[str, np.ndarray]
    optimizer: Optimizer
    phases: Phases
    agreement: Agreement
    checkpoints: Checkpoints
    goodput: Goodput
    lock: WorkdirLock | None


def setup(
    config: ConfigDict,
    data: Path,
    directory: RunDirectory,
    goodput: Goodput,
    init_from: tuple[RunDirectory, ...] = (),
    change_steps: bool = False,
) -> Setup:
    """Checks that config, devices, data and run directory fit each other, and opens them.

    Nothing is written before everything else was found to fit.

    Args:
      config: all sections.
      data: directory of the prepared data.
      directory: where the run is kept; it is created if the run is new.
      goodput: counts the time from the start of the process.
      init_from: the run to start from, or several dense ones that become its experts.
      change_steps: lets `config.train.steps` differ from that of the run so far.
    """
    model_config = ModelConfig.for_platform(config.model, jax.default_backend())
    train = config.train
    mesh = make_mesh(**config.parallel)
    check_batch(train.global_batch_size, train.microbatches, model_config.batch_axis, mesh)
    prepared = PreparedData.open(data)
    if model_config.document_mask and model_config.bos_id != prepared.tokenizer.bos_id:
        raise ConfigError(
            f"config.model.bos_id: got {model_config.bos_id}; must be {prepared.tokenizer.bos_id}, "
            f"with which documents begin in {data}"
        )
    batches = prepared.training_batches(
        sequence_length=model_config.sequence_length,
        vocab_size=model_config.vocab_size,
        global_batch_size=train.global_batch_size,
        seed=train.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        mixture=config.data.mixture,
    )
    validation_rows = train.validation_batches * train.global_batch_size
    validation_sets = sets_to_validate(
        prepared.held_out("validation"), validation_rows, model_config.segment_length
    )
    check_sources(init_from, model_config, prepared)
    lock = directory.open_for_training(config.to_dict(), prepared, change_steps)
    announce(model_config, config, mesh, batches)
    optimizer = make_optimizer(train, count_dense_steps(config))
    agreement = Agreement(mesh)
    return Setup(
        config=config,
        model_config=model_config,
        mesh=mesh,
        directory=directory,
        init_from=init_from,
        batches=batches,
        validation_sets=validation_sets,
        optimizer=optimizer,
        phases=Phases(config, model_config, optimizer, mesh),
        agreement=agreement,
        checkpoints=open_checkpoints(directory, config, agreement),
        goodput=goodput,
        lock=lock,
    )


def open_checkpoints(
    directory: RunDirectory, config: ConfigDict, agreement: Agreement
) -> Checkpoints:
    """The run's checkpoints; all processes agree on which of them are intact."""
    saves = config.checkpoint
    return Checkpoints(
        directory.checkpoint_directory,
        Retention(saves.keep, saves.keep_best, saves.keep_every_steps),
        all_well=lambda well: not agreement.now(Wishes(damage=not well)).damage,
        witness=None if is_remote(directory.path) else directory.config_file,
    )


def announce(
    model_config: ModelConfig, config: ConfigDict, mesh: Mesh, batches: TrainingBatches
) -> None:
    """Says what is about to be trained."""
    counts = parameter_counts(model_config)
    num_experts = model_config.num_experts
    tokens = config.train.global_batch_size * model_config.sequence_length
    kind = f"Lory with {num_experts} experts" if num_experts else "dense baseline"
    if num_experts and model_config.routing != "causal":
        kind = f"baseline {model_config.routing} with {num_experts} experts"
    epochs = config.train.steps / batches.batches_per_epoch
    device = jax.devices()[0].device_kind
    rank = model_config.expert_rank
    merged_by = f"deltas of rank {rank}" if rank else model_config.merged_ffn
    say(
        f"{kind}: {counts['total'] / 1e6:,.1f}M parameters, {counts['active'] / 1e6:,.1f}M active\n"
        f"{config.train.steps:,} steps of {tokens:,} tokens, {epochs:.2f} epochs of "
        f"{batches.num_instances:,} instances\n"
        f"mesh {dict(mesh.shape)} of {device}, attention by {model_config.attention}"
        + (f", merged FFN by {merged_by}" if num_experts else "")
        + ("" if peak_flops(device) else " (peak FLOP/s unknown: MFU is not reported)")
    )
    if batches.mixture is not None:
        say(batches.mixture.describe(config.train.steps * config.train.global_batch_size))
