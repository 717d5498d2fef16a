"""The jitted training and evaluation steps.

Letters: B batch, L sequence, V vocabulary, Y layers, N segments, E experts.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh

from lory_jax.model.transformer import ModelConfig, Params, Routing, build, merge_params
from lory_jax.parallel import replicated
from lory_jax.training.optimizer import clip_by_norm
from lory_jax.training.state import State, state_shardings

Metrics = dict[str, Array]

ACTIVITY_WINDOW = 10  # steps; paper, G.1


def cross_entropy(logits_BxLxV: Array, targets_BxL: Array) -> Array:
    """Negative log-likelihood of every target in nats, float32 `[B, L]`."""
    with jax.named_scope("loss"):
        return optax.softmax_cross_entropy_with_integer_labels(logits_BxLxV, targets_BxL)


def routing_metrics(r_YxBxNxE: Array, last_active_YxE: Array, step: Array) -> tuple[Metrics, Array]:
    """Utilisation (paper, G.1) and entropy of the routing weights.

    Returns `experts_active`, the number of (layer, expert) pairs with a weight above 2/E at least
    once in the last 10 steps; `router_entropy`, the mean in nats; and the new `last_active_YxE`.
    """
    num_experts = r_YxBxNxE.shape[-1]
    is_active_YxE = jnp.any(r_YxBxNxE > 2.0 / num_experts, axis=(1, 2))
    last_active_YxE = jnp.where(is_active_YxE, step, last_active_YxE)
    entropy_YxBxN = -jnp.sum(jax.scipy.special.xlogy(r_YxBxNxE, r_YxBxNxE), axis=-1)
    metrics = {
        "experts_active": jnp.sum(last_active_YxE > step - ACTIVITY_WINDOW),
        "router_entropy": jnp.mean(entropy_YxBxN),
    }
    return metrics, last_active_YxE


def make_train_step(
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    schedule: Callable[[Array], Array],
    clip_norm: float,
    mesh: Mesh,
) -> Callable[[State, Array], tuple[State, Metrics]]:
    """Returns `(state, tokens_BxL+1) -> (state, metrics)`; the state given is donated."""
    graph, _ = build(config)

    def loss_fn(params: Params, tokens_BxL1: Array) -> tuple[Array, Array | None]:
        model = merge_params(graph, params)
        logits_BxLxV, r_YxBxNxE = model(tokens_BxL1[:, :-1])
        return jnp.mean(cross_entropy(logits_BxLxV, tokens_BxL1[:, 1:])), r_YxBxNxE

    def train_step(state: State, tokens_BxL1: Array) -> tuple[State, Metrics]:
        (loss, r_YxBxNxE), gradients = jax.value_and_grad(loss_fn, has_aux=True)(
            state["params"], tokens_BxL1
        )
        with jax.named_scope("optimizer"):
            rate = schedule(state["step"])
            norm = optax.global_norm(gradients)
            gradients = clip_by_norm(gradients, norm, clip_norm)
            updates, opt_state = optimizer.update(gradients, state["opt_state"], state["params"])
            params = jax.tree.map(lambda p, u: p - rate * u, state["params"], updates)
        new: State = {"step": state["step"] + 1, "params": params, "opt_state": opt_state}
        metrics: Metrics = {"loss": loss, "learning_rate": rate, "grad_norm": norm}
        if r_YxBxNxE is not None:
            routed, new["last_active_YxE"] = routing_metrics(
                r_YxBxNxE, state["last_active_YxE"], new["step"]
            )
            metrics |= routed
        return new, metrics

    pinned = (state_shardings(config, optimizer, mesh), replicated(mesh))
    return jax.jit(train_step, donate_argnums=0, out_shardings=pinned)


def make_loss_step(
    config: ModelConfig, mesh: Mesh, routing: str | None = None, prompt_length: int = 0
) -> Callable[[Any, Array], Array]:
    """Returns `(params, tokens_BxL+1) -> nll_BxL`, replicated, in nats.

    `routing` None is exactly what training sees; "segment" and "prompt" route by a prompt of the
    first `prompt_length` tokens of every row.
    """
    graph, _ = build(config)

    def loss_step(params: Params, tokens_BxL1: Array) -> Array:
        rule = None
        if routing is not None and config.num_experts:
            lengths_B = jnp.full(tokens_BxL1.shape[0], prompt_length)
            rule = Routing(routing, lengths_B)
        logits_BxLxV, _ = merge_params(graph, params)(tokens_BxL1[:, :-1], rule)
        return cross_entropy(logits_BxLxV, tokens_BxL1[:, 1:])

    return jax.jit(loss_step, out_shardings=replicated(mesh))
