"""The start of a run from the parameters of another work directory (`train --init_from`)."""

from pathlib import Path

import jax
import optax
from jax.sharding import Mesh

from lory_jax.config import fields_where
from lory_jax.data.tokenizer import Tokenizer
from lory_jax.errors import ConfigError
from lory_jax.model.config import ModelConfig
from lory_jax.run.directory import (
    DENSE,
    EXPERTS,
    check_same_ids,
    load_params,
    model_config,
    phase_config,
)
from lory_jax.training.state import State, new_state, state_shardings


def check_source(source: Path, config: ModelConfig, tokenizer: Tokenizer, data: Path) -> None:
    """Raises unless a run of `config` on `data` can start from the work directory `source`.

    Raises:
      ConfigError: the models differ; the message gives the flags that would make them agree.
      InputError: `source` is no work directory, or has another tokenizer.
    """
    found = model_config(source)
    # Parameters mean the same only if these fields agree; all others may change between runs.
    architecture = fields_where("model", is_architecture=True)
    wrong = [name for name in architecture if getattr(found, name) != getattr(config, name)]
    if found.num_experts not in (0, config.num_experts):
        wrong.append("num_experts")
    if wrong:
        flags = " ".join(f"--config.model.{name}={getattr(found, name)}" for name in wrong)
        raise ConfigError(
            f"--init_from: {source} holds another model than config.model; add {flags}"
        )
    check_same_ids(tokenizer, data, source)


def state_from(
    source: Path, config: ModelConfig, optimizer: optax.GradientTransformation, mesh: Mesh
) -> tuple[State, str]:
    """A state at step 0 around the newest parameters of `source`, and the phase that it is of.

    Where `config` has experts and `source` is dense, the run starts in its dense phase, which may
    have no steps.
    """
    found, params, _ = load_params(source, mesh)
    phase = EXPERTS if found.num_experts == config.num_experts else DENSE
    model = phase_config(config, phase)
    start = jax.jit(
        lambda params: new_state(model, optimizer, params),
        out_shardings=state_shardings(model, optimizer, mesh),
        donate_argnums=0,
    )
    return start(params), phase
