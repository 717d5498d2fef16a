"""What a router learns without gradients: values that are adjusted after every training step.

    choice_bias [E]  loss-free balancing (Wang et al. 2024, arXiv 2408.15664): added to a token's
                     probabilities only to choose its experts, and raised by a fixed rate for every
                     expert that got fewer tokens than the mean, lowered for one that got more

They are parameters of the FFN, so that checkpoints hold them and evaluation and decoding find them.
Their gradient is 0 and weight decay leaves them out; `adapted` sets their new values.

Letters: Y layers, E experts.
"""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array

from lory_jax.model.config import ModelConfig
from lory_jax.model.parameters import Initializer
from lory_jax.model.routing import Routed


def declare_adapted(init: Initializer, config: ModelConfig) -> dict[str, nnx.Param]:
    """The adapted parameter of a layer's router, by name; empty for most rules."""
    if config.adapted_parameter == "choice_bias":
        return {"choice_bias": init.constant((config.num_experts,), ("router_experts",), 0.0)}
    return {}


def adapted(config: ModelConfig, ffn: dict[str, Any], routed: Routed) -> dict[str, Array]:
    """The values after a step, stacked over the layers, from those before it.

    Args:
      config: the model's.
      ffn: the stacked parameters of all FFNs before the step.
      routed: how every layer was routed in the step.
    """
    if config.adapted_parameter == "choice_bias":
        load_YxE = routed.load_E
        assert load_YxE is not None
        lack_YxE = jnp.mean(load_YxE, axis=-1, keepdims=True) - load_YxE
        return {"choice_bias": ffn["choice_bias"] + config.balancing_rate * jnp.sign(lack_YxE)}
    return {}
