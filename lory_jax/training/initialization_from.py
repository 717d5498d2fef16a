"""The start of a run from the parameters of another run (`train --init_from`)."""

from pathlib import Path

import jax
from jax.sharding import Mesh

from lory_jax.data.tokenizer import Tokenizer
from lory_jax.errors import ConfigError
from lory_jax.model.config import ModelConfig
from lory_jax.run import directory
from lory_jax.run.directory import (
    DENSE,
    EXPERTS,
    check_same_ids,
    load_params,
    phase_config,
)
from lory_jax.training.optimizer import Optimizer
from lory_jax.training.state import State, new_state, state_shardings

# What must be the same for parameters to mean the same; all else may change between runs.
ARCHITECTURE = (
    "vocab_size",
    "num_layers",
    "embed_dim",
    "num_heads",
    "num_kv_heads",
    "mlp_dim",
    "tie_embeddings",
    "rope_theta",
    "rope_scaling",
    "rope_factor",
    "rope_low_frequency_factor",
    "rope_high_frequency_factor",
    "rope_original_length",
    "norm_epsilon",
)


def check_source(source: Path, model_config: ModelConfig, tokenizer: Tokenizer, data: Path) -> None:
    """Raises unless a run of `model_config` on `data` can start from the run directory `source`.

    Raises:
      ConfigError: the models differ; the message gives the fields that would make them agree.
      InputError: `source` is no run directory, or has another tokenizer.
    """
    found = directory.model_config(source)
    wrong = [name for name in ARCHITECTURE if getattr(found, name) != getattr(model_config, name)]
    if found.num_experts not in (0, model_config.num_experts):
        wrong.append("num_experts")
    if wrong:
        fields = " ".join(f"config.model.{name}={getattr(found, name)}" for name in wrong)
        raise ConfigError(
            f"init_from: {source} holds another model than config.model; set {fields}"
        )
    check_same_ids(tokenizer, data, source)


def state_from(
    source: Path, model_config: ModelConfig, optimizer: Optimizer, mesh: Mesh
) -> tuple[State, str]:
    """A state at step 0 around the newest parameters of `source`, and its phase.

    Where `model_config` has experts and `source` is dense, the run starts in its dense phase, which
    may have no steps.
    """
    found, params, _ = load_params(source, mesh)
    phase = EXPERTS if found.num_experts == model_config.num_experts else DENSE
    start_config = phase_config(model_config, phase)
    start = jax.jit(
        lambda params: new_state(start_config, optimizer, params),
        out_shardings=state_shardings(start_config, optimizer, mesh),
        donate_argnums=0,
    )
    return start(params), phase
