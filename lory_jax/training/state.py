"""The train state: a plain nested dict, and where each of its leaves lives on the mesh.

    {"step": completed steps, "params": ..., "opt_state": optax's, "last_active_YxE": Lory only}

`last_active_YxE` is the last step at which an expert had a routing weight above 2/E; keeping it in
the state makes the utilisation of paper G.1 ("active at least once in 10 steps") exact on resume.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh

from lory_jax.model.config import ModelConfig
from lory_jax.model.transformer import build, init_params
from lory_jax.parallel import check_parameters, replicated, shardings
from lory_jax.training.optimizer import Optimizer

State = dict[str, Any]

NEVER = -(2**30)


def new_state(model_config: ModelConfig, optimizer: Optimizer, params: Any) -> State:
    """A state at step 0 around these parameters."""
    state = {
        "step": jnp.zeros((), jnp.int32),
        "params": params,
        "opt_state": optimizer.init(params),
    }
    if model_config.num_experts:
        state["last_active_YxE"] = never_active(model_config)
    return state


def never_active(model_config: ModelConfig) -> Array:
    return jnp.full((len(model_config.layer_numbers), model_config.num_experts), NEVER, jnp.int32)


def state_shardings(model_config: ModelConfig, optimizer: Optimizer, mesh: Mesh) -> State:
    """A `NamedSharding` for every leaf; Adam's moments are sharded as their parameters are.

    Raises:
      ConfigError: the model does not fit the mesh (`lory_jax.parallel.check_parameters`).
    """
    _, axes = build(model_config)
    on_mesh = shardings(axes, mesh)
    abstract = jax.eval_shape(lambda: init_params(model_config, jax.random.key(0)))
    check_parameters(axes, abstract, mesh)
    abstract_opt = jax.eval_shape(optimizer.init, abstract)
    result = {
        "step": replicated(mesh),
        "params": on_mesh,
        "opt_state": optax.tree_utils.tree_map_params(
            optimizer,
            lambda _, sharding: sharding,
            abstract_opt,
            on_mesh,
            transform_non_params=lambda _: replicated(mesh),
        ),
    }
    if model_config.num_experts:
        result["last_active_YxE"] = replicated(mesh)
    return result


def init_state(model_config: ModelConfig, optimizer: Optimizer, mesh: Mesh, seed: int) -> State:
    """A fresh state on the mesh. The seed alone decides its values, not the mesh."""

    def init(key: Array) -> State:
        return new_state(model_config, optimizer, init_params(model_config, key))

    pinned = jax.jit(init, out_shardings=state_shardings(model_config, optimizer, mesh))
    return pinned(jax.random.key(seed))


def abstract_state(model_config: ModelConfig, optimizer: Optimizer, mesh: Mesh) -> State:
    """Shapes, types and shardings of the state: what a checkpoint is restored into."""
    shapes = jax.eval_shape(
        lambda: new_state(model_config, optimizer, init_params(model_config, jax.random.key(0)))
    )
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        state_shardings(model_config, optimizer, mesh),
    )
