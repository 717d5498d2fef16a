"""Writes a LLaMA as the run directory of a run at step 0, dense or upcycled."""

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lory_jax.config import base_config, validate
from lory_jax.conversion.hf_directory import LlamaDirectory, check_absent, temporary_sibling
from lory_jax.data.manifest import TOKENIZER_NAME
from lory_jax.data.tokenizer import Tokenizer
from lory_jax.model.config import ModelConfig
from lory_jax.model.transformer import Params, build, init_params
from lory_jax.parallel import shardings
from lory_jax.run.checkpoints import Checkpoints
from lory_jax.run.directory import CONFIG, DATASET, Dataset
from lory_jax.run.phases import EXPERTS
from lory_jax.storage import naming
from lory_jax.training.upcycle import upcycle_params

EVALUATION_BATCH = 8  # instances; it is not known here how many fit into memory in training


def write_start(
    workdir: Path, directory: LlamaDirectory, num_experts: int, seed: int, mesh: Mesh
) -> None:
    """Writes `workdir` with one checkpoint, of step 0.

    Args:
      workdir: the directory to make; it must not exist yet, or be empty.
      directory: the LLaMA to import.
      num_experts: copies of every FFN; 0 keeps the model dense.
      seed: the seed of the router.
      mesh: where the parameters are held while they are converted.

    Raises:
      InputError: `workdir` exists and is not empty.
      ConfigError: the model does not fit config.model.
    """
    check_absent(workdir)
    config = base_config()
    config.model.update(directory.fields)
    config.model.num_experts = num_experts
    config.train.seed = seed
    config.train.global_batch_size = EVALUATION_BATCH
    validate(config)
    params = directory.params(mesh)
    if num_experts:
        with_experts = dataclasses.replace(directory.model_config, num_experts=num_experts)
        params = upcycled(params, with_experts, mesh, seed)

    write_run(workdir, config.to_dict(), directory.tokenizer, params)


def write_run(
    workdir: Path,
    config: Mapping[str, Any],
    tokenizer: Tokenizer,
    params: Params,
    dataset: Dataset | None = None,
) -> None:
    """Writes a run directory with one checkpoint, of step 0, that appears complete or not at all.

    Args:
      workdir: the directory to make.
      config: all sections.
      tokenizer: the run's.
      params: parameters alone: a run that starts from them has fresh moments of AdamW.
      dataset: the prepared data that the run records; None for none.
    """
    workdir.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_sibling(workdir)
    temporary.mkdir()
    try:
        with naming(workdir):
            tokenizer.save(temporary / TOKENIZER_NAME)
            (temporary / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
            if dataset is not None:
                text = json.dumps(dataset._asdict(), indent=1) + "\n"
                (temporary / DATASET).write_text(text, encoding="utf-8")
        checkpoints = Checkpoints(temporary / "checkpoints", keep=1)
        checkpoints.save({"step": jnp.zeros((), jnp.int32), "params": params}, EXPERTS)
        checkpoints.close()
        temporary.replace(workdir)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def upcycled(dense: Params, model_config: ModelConfig, mesh: Mesh, seed: int) -> Params:
    """A Lory model: experts copied from the dense FFNs, and a router drawn as `train` draws it."""

    def with_router(dense: Params, key: jax.Array) -> Params:
        return upcycle_params(dense, init_params(model_config, key)["layers"]["ffn"]["router"])

    pinned = jax.jit(with_router, out_shardings=shardings(build(model_config)[1], mesh))
    return pinned(dense, jax.random.fold_in(jax.random.key(seed), 1))
