"""The start of a run from the parameters of another run directory (`train --init_from`)."""

from collections.abc import Sequence

import jax
from jax.sharding import Mesh

from lory_jax.config import fields_where
from lory_jax.data.prepared import PreparedData
from lory_jax.errors import ConfigError
from lory_jax.model.config import ModelConfig
from lory_jax.model.routing_rules import ADAPTED, MERGED
from lory_jax.model.transformer import Params, init_params
from lory_jax.run.directory import RunDirectory
from lory_jax.run.phases import DENSE, EXPERTS, phase_config
from lory_jax.training.branch_merge import check_branches, merge_branches
from lory_jax.training.optimizer import Optimizer
from lory_jax.training.state import State, new_state, state_shardings
from lory_jax.training.upcycle import grow


def check_sources(
    sources: Sequence[RunDirectory], model_config: ModelConfig, data: PreparedData
) -> None:
    """Raises unless a run of `model_config` on `data` can start from the runs `sources`, if any.

    Raises:
      ConfigError, InputError: see `check_source` and `check_branches`.
    """
    for source in sources:
        check_source(source, model_config, data, is_alone=len(sources) == 1)
    if len(sources) > 1:
        check_branches([source.model_config for source in sources], model_config)


def check_source(
    source: RunDirectory, model_config: ModelConfig, data: PreparedData, is_alone: bool = True
) -> None:
    """Raises unless a run of `model_config` on `data` can start from the run `source`.

    Raises:
      ConfigError: the models differ; the message gives the fields that would make them agree.
      InputError: `source` is not a run directory, or has another tokenizer.
    """
    found = source.model_config
    # Parameters mean the same only if these fields agree; all others may change between runs.
    architecture = fields_where("model", is_architecture=True)
    wrong = [name for name in architecture if getattr(found, name) != getattr(model_config, name)]
    if found.num_experts and model_config.num_experts:
        of_experts = fields_where("model", of_experts=True)
        wrong += [
            name for name in of_experts if getattr(found, name) != getattr(model_config, name)
        ]
    if is_alone and found.num_experts and not _grows_by(found, model_config):
        wrong.append("num_experts")
    if wrong:
        fields = " ".join(f"config.model.{name}={getattr(found, name)}" for name in wrong)
        raise ConfigError(
            f"init_from: the model of {source} differs from config.model; set {fields}"
        )
    source.check_same_ids(data)


def _grows_by(found: ModelConfig, model_config: ModelConfig) -> int:
    """How many times as many experts the run has as its source; 0 if it cannot start from it."""
    times, rest = divmod(model_config.num_experts, found.num_experts)
    return times if not rest and (times == 1 or model_config.routing in MERGED) else 0


def state_from(
    sources: Sequence[RunDirectory],
    model_config: ModelConfig,
    optimizer: Optimizer,
    mesh: Mesh,
    seed: int = 0,
    redraw: float = 0.0,
) -> tuple[State, str]:
    """A state at step 0 around the parameters of the runs `sources`, and its phase.

    Several are dense, and become one expert each (branch_merge.py). One is continued: where it is
    dense and `model_config` has experts, the run starts in its dense phase, which may have no
    steps. Where `model_config` has a multiple of its experts, these are copied, with the share
    `redraw` of the copies' entries drawn anew.
    """
    if len(sources) > 1:
        branches = [source.load_params(mesh).params for source in sources]
        return _state_of_branches(branches, model_config, optimizer, mesh, seed), EXPERTS
    found, params, _ = sources[0].load_params(mesh)
    times = _grows_by(found, model_config) if found.num_experts else 1
    phase = EXPERTS if found.num_experts or not model_config.num_experts else DENSE
    start_config = phase_config(model_config, phase)

    def begin(params: Params) -> State:
        if times > 1:
            key = jax.random.fold_in(jax.random.key(seed), 3)
            params = grow(params, times, key, redraw)
        return new_state(start_config, optimizer, _with_own_adapted(start_config, params))

    start = jax.jit(
        begin,
        out_shardings=state_shardings(start_config, optimizer, mesh),
        donate_argnums=() if times > 1 else 0,  # a grown array cannot take the place of its source
    )
    return start(params), phase


def _state_of_branches(
    branches: Sequence[Params],
    model_config: ModelConfig,
    optimizer: Optimizer,
    mesh: Mesh,
    seed: int,
) -> State:
    def begin(branches: Sequence[Params]) -> State:
        key = jax.random.fold_in(jax.random.key(seed), 1)
        params = merge_branches(model_config, branches, key)
        return new_state(model_config, optimizer, params)

    pinned = jax.jit(begin, out_shardings=state_shardings(model_config, optimizer, mesh))
    return pinned(branches)


def _with_own_adapted(model_config: ModelConfig, params: Params) -> Params:
    """The parameters with the adapted ones of `model_config`, for another rule may have had others.

    What the source has is kept; what it lacks begins as in a run from scratch.
    """
    found = params["layers"]["ffn"]
    fresh = init_params(model_config, jax.random.key(0))["layers"]["ffn"]
    adapted = {name: found.get(name, fresh[name]) for name in fresh.keys() & ADAPTED}
    kept = {name: w for name, w in found.items() if name not in ADAPTED}
    return {**params, "layers": {**params["layers"], "ffn": kept | adapted}}
