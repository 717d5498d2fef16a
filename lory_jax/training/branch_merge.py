"""Several dense runs as the experts of one model (`train --init_from=RUN_DIR,RUN_DIR,…`).

As in Branch-Train-MiX (Sukhbaatar et al. 2024, arXiv 2403.07816): models that were trained apart,
each on its own domains, give one expert each, and everything else is their average. The router is
drawn anew, and training teaches it, with all the rest, which expert a segment requires. The runs
should share their start: averages of models that never had common parameters mean nothing.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

from lory_jax.errors import ConfigError
from lory_jax.model.config import ModelConfig
from lory_jax.model.layer_order import split_stack
from lory_jax.model.routing_rules import MERGED
from lory_jax.model.transformer import Params, init_params
from lory_jax.training.upcycle import with_ffn


def check_branches(found: Sequence[ModelConfig], model_config: ModelConfig) -> None:
    """Raises `ConfigError` unless dense models can be the experts of `model_config`, one each."""
    experts = model_config.num_experts
    if any(branch.num_experts for branch in found):
        raise ConfigError(
            "init_from: several runs must be dense; set config.model.num_experts=0 to train them"
        )
    if experts != len(found):
        raise ConfigError(
            f"config.model.num_experts: got {experts}; must be {len(found)}, the number of runs in "
            "init_from"
        )
    if model_config.routing not in MERGED or model_config.expert_rank:
        raise ConfigError(
            f"init_from: several runs are full experts to merge; must be one run with "
            f"config.model.routing={model_config.routing}, expert_rank={model_config.expert_rank}"
        )


def merge_branches(model_config: ModelConfig, branches: Sequence[Params], key: Array) -> Params:
    """The parameters of `model_config` whose experts are the FFNs of these dense models.

    Args:
      model_config: a model with as many experts as there are branches.
      branches: the parameters of dense models of its architecture.
      key: draws the router.
    """

    def mean(*leaves: Array) -> Array:
        return jnp.mean(jnp.stack(leaves), axis=0)

    average = jax.tree.map(mean, *branches)
    layers, dense_layers = split_stack(model_config, average["layers"])
    own = [split_stack(model_config, branch["layers"])[0]["ffn"] for branch in branches]
    experts = jax.tree.map(lambda *leaves: jnp.stack(leaves, axis=1), *own)
    router = init_params(model_config, key)["layers"]["ffn"]["router"]
    merged = {**average, "layers": layers}
    if dense_layers is not None:
        merged["dense_layers"] = dense_layers
    return with_ffn(merged, {**experts, "router": router})
