"""From the dense warm-up to experts: every FFN is copied E times (paper, section 4.1 and G.3).

Under uniform routing an expert sees 1/E of the gradient that the dense FFN would see. Adam's
moments are carried over at that scale, m/E and v/E^2, so that the first update moves every expert,
and with them the merged function, as the dense step would. Two side effects are not corrected:
Adam's epsilon counts E times as much against the smaller moments, and the global gradient norm is
smaller (the experts' part by sqrt(E)), so clipping sets in later.

The sparse baselines are upcycled alike (Komatsuzaki et al. 2023, arXiv 2212.05055), and under a
uniform router an expert's part of the gradient is `gradient_divisor` times smaller. With top2,
whose weights share 1, the function stays what it was where nothing is dropped. The others multiply
with a probability, near 1/E at first: the loss jumps, and the router makes up for it.

Copies are alike until the router tells them apart. A share of every expert's entries can be drawn
anew, in the spirit of Drop-Upcycling (Nakamura et al. 2025, arXiv 2502.19261): from a normal with
the mean and the standard deviation of the matrix that is copied. The paper draws whole hidden units
(the same columns of gate and up and rows of down); here every entry is drawn by itself, so all
units change a little. Adam's moments of redrawn entries start at zero.
"""

import math
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh

from lory_jax.model.config import ModelConfig
from lory_jax.model.experts import BIASES
from lory_jax.model.layer_order import split_stack
from lory_jax.model.low_rank import FACTOR_AXES, shared_by_experts
from lory_jax.model.routing_rules import ADAPTED, EXPERT_CHOICE, TOKEN_CHOICE
from lory_jax.model.transformer import Params, init_params
from lory_jax.training.optimizer import Optimizer
from lory_jax.training.state import State, never_active, state_shardings

FFN_MATRICES = ("gate", "up", "down")


def make_upcycle(
    model_config: ModelConfig, optimizer: Optimizer, mesh: Mesh, seed: int, redraw: float = 0.0
) -> Callable[[State], State]:
    """Returns `dense state -> the state with experts that continues it`.

    Args:
      model_config: that of the experts.
      optimizer: that of the run.
      mesh: where the state lies.
      seed: that of the run.
      redraw: the share of every expert's entries that is drawn anew.
    """

    def upcycle(dense: State) -> State:
        # With the key of the dense parameters, the router would start as a copy of some of their
        # draws.
        key = jax.random.fold_in(jax.random.key(seed), 1)
        fresh = dict(init_params(model_config, key)["layers"]["ffn"])
        dense = with_split_layers(model_config, dense)
        if model_config.expert_rank:
            return with_deltas(model_config, dense, fresh)
        router_YxDxE = fresh["router"]
        adapted = {name: fresh[name] for name in fresh.keys() & ADAPTED}
        adam, *rest = dense["opt_state"]
        zeros_YxDxE, divisor = jnp.zeros_like(router_YxDxE), gradient_divisor(model_config)
        moments = adam._replace(
            mu=upcycle_params(adam.mu, zeros_YxDxE, divisor=divisor),
            nu=upcycle_params(adam.nu, zeros_YxDxE, divisor=divisor**2),
        )
        zeros = jax.tree.map(jnp.zeros_like, adapted)
        moments = moments._replace(mu=with_ffn(moments.mu, zeros), nu=with_ffn(moments.nu, zeros))
        params = with_ffn(upcycle_params(dense["params"], router_YxDxE), adapted)
        if redraw:
            key = jax.random.fold_in(jax.random.key(seed), 2)
            params, moments = redraw_entries(params, moments, key, redraw)
        return {
            "step": dense["step"],
            "params": params,
            "opt_state": (moments, *rest),
            "last_active_YxE": never_active(model_config),
        }

    return jax.jit(upcycle, out_shardings=state_shardings(model_config, optimizer, mesh))


def with_split_layers(model_config: ModelConfig, dense: State) -> State:
    """The dense state with its layers apart, where only some of them are to hold experts."""

    def split(params: Params) -> Params:
        layers, dense_layers = split_stack(model_config, params["layers"])
        others = {} if dense_layers is None else {"dense_layers": dense_layers}
        return {**params, **others, "layers": layers}

    adam, *rest = dense["opt_state"]
    adam = adam._replace(mu=split(adam.mu), nu=split(adam.nu))
    return {**dense, "params": split(dense["params"]), "opt_state": (adam, *rest)}


def with_deltas(model_config: ModelConfig, dense: State, fresh: Params) -> State:
    """The dense state with a router and low-rank deltas, whose product is zero, beside its FFNs.

    The FFNs that all experts share go on as they were, moments included.
    """
    added = {name: fresh[name] for name in ("router", *FACTOR_AXES)}

    def with_zeros(moments: Params) -> Params:
        dtype = moments["layers"]["ffn"]["gate"].dtype
        zeros = {name: jnp.zeros(w.shape, dtype) for name, w in added.items()}
        return with_ffn(moments, zeros)

    adam, *rest = dense["opt_state"]
    adam = adam._replace(mu=with_zeros(adam.mu), nu=with_zeros(adam.nu))
    return {
        "step": dense["step"],
        "params": with_ffn(dense["params"], added),
        "opt_state": (adam, *rest),
        "last_active_YxE": never_active(model_config),
    }


def gradient_divisor(model_config: ModelConfig) -> float:
    """The dense FFN's gradient divided by an expert's, if all experts have equal weight.

    Merged experts and those of top2 share each token's weight of 1. With top1, an expert sees 1/E
    of the tokens, each weighted with 1/E; expert choice has its capacity factor times as many. With
    thresholds, an expert sees k/E of them, each weighted with the sigmoid of a score above the
    threshold. ReMoE weights with the mean gate. Scores are normal variables at first.
    """
    E = model_config.num_experts
    if model_config.routing in EXPERT_CHOICE:
        return E * E / model_config.capacity_factor
    if model_config.routing == "expert_threshold":
        share = min(model_config.experts_per_token / E, 1.0)
        normal = statistics.NormalDist()
        density = normal.pdf(normal.inv_cdf(1 - share)) if share < 1 else 0.0
        score = model_config.router_init_scale * density / share  # the mean above the threshold
        return (1 + math.exp(-score)) / share
    if model_config.routing == "remoe":
        # The mean of relu of a normal variable of this standard deviation, at unit hidden states.
        return math.sqrt(2 * math.pi) / model_config.router_init_scale
    return E * E if TOKEN_CHOICE.get(model_config.routing) == 1 else E


def upcycle_params(params: Params, router_YxDxE: Array, divisor: float = 1) -> Params:
    """Copies `[Y, D, F]` FFN matrices to `[Y, E, D, F]`, divided by `divisor`; adds the router.

    Biases, if there are any, are copied alike.
    """
    num_experts = router_YxDxE.shape[-1]

    def copy(w_Yx: Array) -> Array:
        return jnp.repeat(w_Yx[:, None] / divisor, num_experts, axis=1)

    layers: dict[str, Any] = dict(params["layers"])
    layers["ffn"] = {name: copy(w) for name, w in layers["ffn"].items()}
    layers["ffn"]["router"] = router_YxDxE
    return {**params, "layers": layers}


def redraw_entries(params: Params, adam: Any, key: Array, share: float) -> tuple[Params, Any]:
    """Draws a share of every expert's entries anew; returns the parameters and Adam's state.

    Every entry of a matrix is chosen by itself; biases stay copies.
    """
    experts, mu, nu = (dict(tree["layers"]["ffn"]) for tree in (params, adam.mu, adam.nu))
    for number, name in enumerate(FFN_MATRICES):
        experts[name], is_new = redrawn(experts[name], jax.random.fold_in(key, number), share)
        mu[name], nu[name] = (jnp.where(is_new, 0, tree[name]) for tree in (mu, nu))

    moments = adam._replace(mu=with_ffn(adam.mu, mu), nu=with_ffn(adam.nu, nu))
    return with_ffn(params, experts), moments


def redrawn(w_YxExMxN: Array, key: Array, share: float) -> tuple[Array, Array]:
    """Experts with a share of their entries drawn anew, and which entries those are.

    New entries have the mean and the standard deviation of the first expert, of which the others
    are copies.
    """
    choice_key, value_key = jax.random.split(key)
    is_new_YxExMxN = jax.random.bernoulli(choice_key, share, w_YxExMxN.shape)
    mean_Yx1x1x1 = jnp.mean(w_YxExMxN[:, :1], axis=(2, 3), keepdims=True)
    std_Yx1x1x1 = jnp.std(w_YxExMxN[:, :1], axis=(2, 3), keepdims=True)
    normal_YxExMxN = jax.random.normal(value_key, w_YxExMxN.shape, w_YxExMxN.dtype)
    drawn_YxExMxN = mean_Yx1x1x1 + std_Yx1x1x1 * normal_YxExMxN
    return jnp.where(is_new_YxExMxN, drawn_YxExMxN, w_YxExMxN), is_new_YxExMxN


def grow(params: Params, times: int, key: Array, share: float) -> Params:
    """The parameters with `times` as many experts: the old ones, then copies of all of them.

    Copies have their original's column of the router, so that both have a part of its weight and
    the model computes what it did. Alike copies would stay alike: `share` of the copies' entries
    are drawn anew.
    """
    ffn = dict(params["layers"]["ffn"])
    for number, name in enumerate(sorted(ffn.keys() - {"router", *shared_by_experts(ffn)})):
        copies = []
        for expert in range(ffn[name].shape[1]):
            original = ffn[name][:, expert : expert + 1]
            copy = jnp.repeat(original, times - 1, axis=1)
            if share and name not in BIASES:
                own_key = jax.random.fold_in(jax.random.fold_in(key, number), expert)
                copy = redrawn(copy, own_key, share)[0]
            copies.append(copy)
        # All first copies, then all second ones: in the order of the router's columns.
        stacked = jnp.stack(copies, axis=2)
        stacked = stacked.reshape(stacked.shape[0], -1, *stacked.shape[3:])
        ffn[name] = jnp.concatenate([ffn[name], stacked], axis=1)
    ffn["router"] = jnp.tile(ffn["router"], (1, 1, times))
    return with_ffn(params, ffn)


def with_ffn(params: Params, ffn: Params) -> Params:
    """The tree with these entries of its FFN in place of its own."""
    layers = params["layers"]
    return {**params, "layers": {**layers, "ffn": {**layers["ffn"], **ffn}}}
