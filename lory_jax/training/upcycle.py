"""From the dense warm-up to experts: every FFN is copied E times (paper, section 4.1 and G.3).

Under uniform routing an expert sees 1/E of the gradient that the dense FFN would see. Adam's
moments are carried over at that scale, m/E and v/E^2, so that the first update moves every expert,
and with them the merged function, as the dense step would. Two side effects are not corrected:
Adam's epsilon counts E times as much against the smaller moments, and the global gradient norm is
smaller (the experts' part by sqrt(E)), so clipping sets in later.

The sparse baselines are upcycled alike (Komatsuzaki et al. 2023, arXiv 2212.05055), and under a
uniform router an expert's part of the gradient is `gradient_divisor` times smaller. With top2,
whose weights sum to 1, the function is unchanged where nothing is dropped. The others multiply by a
probability, which is near 1/E at first: the loss jumps, and the router makes up for it.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh

from lory_jax.model.config import ModelConfig
from lory_jax.model.routing_rules import EXPERT_CHOICE
from lory_jax.model.transformer import Params, init_params
from lory_jax.training.optimizer import Optimizer
from lory_jax.training.state import State, never_active, state_shardings

FFN_MATRICES = ("gate", "up", "down")


def make_upcycle(
    model_config: ModelConfig, optimizer: Optimizer, mesh: Mesh, seed: int
) -> Callable[[State], State]:
    """Returns `dense state -> the state with experts that continues it`.

    `model_config` is that of the experts, `seed` that of the run.
    """

    def upcycle(dense: State) -> State:
        # With the key of the dense parameters, the router would start as a copy of some of their
        # draws.
        key = jax.random.fold_in(jax.random.key(seed), 1)
        router_YxDxE = init_params(model_config, key)["layers"]["ffn"]["router"]
        adam, *rest = dense["opt_state"]
        zeros_YxDxE, divisor = jnp.zeros_like(router_YxDxE), gradient_divisor(model_config)
        moments = adam._replace(
            mu=upcycle_params(adam.mu, zeros_YxDxE, divisor=divisor),
            nu=upcycle_params(adam.nu, zeros_YxDxE, divisor=divisor**2),
        )
        return {
            "step": dense["step"],
            "params": upcycle_params(dense["params"], router_YxDxE),
            "opt_state": (moments, *rest),
            "last_active_YxE": never_active(model_config),
        }

    return jax.jit(upcycle, out_shardings=state_shardings(model_config, optimizer, mesh))


def gradient_divisor(model_config: ModelConfig) -> float:
    """The dense FFN's gradient divided by an expert's, if all experts have equal weight.

    Merged experts and those of top2 share each token's weight of 1. With top1, an expert sees 1/E
    of the tokens, each weighted with 1/E; expert choice has its capacity factor times as many.
    """
    E = model_config.num_experts
    if model_config.routing in EXPERT_CHOICE:
        return E * E / model_config.capacity_factor
    return E * E if model_config.routing == "top1" else E


def upcycle_params(params: Params, router_YxDxE: Array, divisor: float = 1) -> Params:
    """Copies `[Y, D, F]` FFN matrices to `[Y, E, D, F]`, divided by `divisor`; adds the router."""
    num_experts = router_YxDxE.shape[-1]

    def copy(w_YxMxN: Array) -> Array:
        return jnp.repeat(w_YxMxN[:, None] / divisor, num_experts, axis=1)

    layers: dict[str, Any] = dict(params["layers"])
    layers["ffn"] = {name: copy(layers["ffn"][name]) for name in FFN_MATRICES}
    layers["ffn"]["router"] = router_YxDxE
    return {**params, "layers": layers}
