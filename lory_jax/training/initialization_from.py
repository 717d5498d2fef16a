"""The start of a run from the parameters of another run directory (`train --init_from`)."""

import jax
from jax.sharding import Mesh

from lory_jax.config import fields_where
from lory_jax.data.prepared import PreparedData
from lory_jax.errors import ConfigError
from lory_jax.model.config import ModelConfig
from lory_jax.model.routing_rules import ADAPTED
from lory_jax.model.transformer import Params, init_params
from lory_jax.run.directory import RunDirectory
from lory_jax.run.phases import DENSE, EXPERTS, phase_config
from lory_jax.training.optimizer import Optimizer
from lory_jax.training.state import State, new_state, state_shardings


def check_source(source: RunDirectory, model_config: ModelConfig, data: PreparedData) -> None:
    """Raises unless a run of `model_config` on `data` can start from the run `source`.

    Raises:
      ConfigError: the models differ; the message gives the fields that would make them agree.
      InputError: `source` is not a run directory, or has another tokenizer.
    """
    found = source.model_config
    # Parameters mean the same only if these fields agree; all others may change between runs.
    architecture = fields_where("model", is_architecture=True)
    wrong = [name for name in architecture if getattr(found, name) != getattr(model_config, name)]
    if found.num_experts not in (0, model_config.num_experts):
        wrong.append("num_experts")
    if wrong:
        fields = " ".join(f"config.model.{name}={getattr(found, name)}" for name in wrong)
        raise ConfigError(
            f"init_from: the model of {source} differs from config.model; set {fields}"
        )
    source.check_same_ids(data)


def state_from(
    source: RunDirectory, model_config: ModelConfig, optimizer: Optimizer, mesh: Mesh
) -> tuple[State, str]:
    """A state at step 0 around the parameters of `source`, and its phase.

    Where `model_config` has experts and `source` is dense, the run starts in its dense phase, which
    may have no steps.
    """
    found, params, _ = source.load_params(mesh)
    phase = EXPERTS if found.num_experts == model_config.num_experts else DENSE
    start_config = phase_config(model_config, phase)
    start = jax.jit(
        lambda params: new_state(start_config, optimizer, _with_own_adapted(start_config, params)),
        out_shardings=state_shardings(start_config, optimizer, mesh),
        donate_argnums=0,
    )
    return start(params), phase


def _with_own_adapted(model_config: ModelConfig, params: Params) -> Params:
    """The parameters with the adapted ones of `model_config`, for another rule may have had others.

    What the source has is kept; what it lacks begins as in a run from scratch.
    """
    found = params["layers"]["ffn"]
    fresh = init_params(model_config, jax.random.key(0))["layers"]["ffn"]
    adapted = {name: found.get(name, fresh[name]) for name in fresh.keys() & ADAPTED}
    kept = {name: w for name, w in found.items() if name not in ADAPTED}
    return {**params, "layers": {**params["layers"], "ffn": kept | adapted}}
