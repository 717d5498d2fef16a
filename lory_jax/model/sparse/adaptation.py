"""What a router learns without gradients: values that are adjusted after every training step.

    choice_bias [E]  loss-free balancing (Wang et al. 2024, arXiv 2408.15664): added to a token's
                     probabilities only to choose its experts, and raised by a fixed rate for every
                     expert that got fewer tokens than the mean, lowered for one that got more
    l1_weight []     ReMoE: the weight of its L1 loss, multiplied by 1.2 after a step in which more
                     gates were open than aimed at, else divided
    threshold [E]    expert threshold: the running mean of the cut-offs (gated.py), corrected for
                     its start at 0 as Adam's moments are
    threshold_updates []  of how many steps that is the mean

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

L1_START, L1_GROWTH = 1e-8, 1.2  # of the paper
L1_LEAST = 1e-12  # so that repeated division never ends at 0, from which nothing grows
THRESHOLD_DECAY = 0.99


def declare_adapted(init: Initializer, config: ModelConfig) -> dict[str, nnx.Param]:
    """The adapted parameters of a layer's router, by name; empty for most rules."""
    if config.adapted_parameter == "choice_bias":
        return {"choice_bias": init.constant((config.num_experts,), ("router_experts",), 0.0)}
    if config.adapted_parameter == "l1_weight":
        return {"l1_weight": init.constant((), (), L1_START)}
    if config.adapted_parameter == "threshold":
        return {
            "threshold": init.constant((config.num_experts,), ("router_experts",), 0.0),
            "threshold_updates": init.constant((), (), 0.0),
        }
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
    if config.adapted_parameter == "l1_weight":
        assert routed.load_E is not None
        excess = jnp.mean(routed.load_E) - config.experts_per_token / config.num_experts
        grown_Y = ffn["l1_weight"] * L1_GROWTH ** jnp.sign(excess)
        return {"l1_weight": jnp.maximum(grown_Y, L1_LEAST)}
    if config.adapted_parameter == "threshold":
        old_YxE, cutoff_YxE = ffn["threshold"], routed.cutoff_E
        assert cutoff_YxE is not None
        updates_Y = ffn["threshold_updates"] + 1
        # The recursion of a mean that is divided by 1 - decay^updates: the first step counts whole.
        share_Yx1 = ((1 - THRESHOLD_DECAY) / (1 - THRESHOLD_DECAY**updates_Y))[:, None]
        moved_YxE = old_YxE + share_Yx1 * (cutoff_YxE - old_YxE)
        return {"threshold": moved_YxE, "threshold_updates": updates_Y}
    return {}
