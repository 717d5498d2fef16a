"""The jitted training and evaluation steps.

Letters: B batch, L sequence, V vocabulary, Y layers, N segments, E experts.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh

from lory_jax.model.config import ModelConfig
from lory_jax.model.routing import Routed, Routing
from lory_jax.model.sparse.adaptation import adapted
from lory_jax.model.transformer import Params, assemble, build
from lory_jax.parallel import replicated
from lory_jax.training.loss import mean_loss, token_losses
from lory_jax.training.optimizer import Optimizer
from lory_jax.training.state import State, state_shardings
from lory_jax.training.top_k import Schedule

Metrics = dict[str, Array]

ACTIVITY_WINDOW = 10  # steps; paper, G.1


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


def sparse_metrics(routed: Routed) -> Metrics:
    """Metrics of the sparse baselines, averaged over the layers.

    `dropped_tokens` is the share of tokens (or segments) that no expert processed; with token
    choice, `load_balancing_loss` is 1 when all experts are chosen equally often, and
    `load_violation` says by what part of the mean load the largest exceeds it (MaxVio of arXiv
    2408.15664). With ReMoE, `load_balancing_loss` is its L1 loss.
    """
    metrics: Metrics = {}
    if routed.load_E is not None:
        load_YxE = routed.load_E
        largest_Y, mean_Y = jnp.max(load_YxE, axis=-1), jnp.mean(load_YxE, axis=-1)
        tiny = jnp.finfo(jnp.float32).tiny  # no token may have an expert
        metrics["load_violation"] = jnp.mean(largest_Y / jnp.maximum(mean_Y, tiny) - 1)
        metrics["experts_per_token"] = jnp.mean(jnp.sum(load_YxE, axis=-1))
    if routed.dropped is not None:
        metrics["dropped_tokens"] = jnp.mean(routed.dropped)
    if routed.balance is not None:
        metrics["load_balancing_loss"] = jnp.mean(routed.balance)
    return metrics


def auxiliary_loss(model_config: ModelConfig, params: Params, balance_Y: Array) -> Array:
    """What is minimised beside the loss: `Routed.balance` of every layer, weighted."""
    if model_config.routing == "remoe":
        weight_Y = jax.lax.stop_gradient(params["layers"]["ffn"]["l1_weight"])
        return jnp.mean(weight_Y * balance_Y)
    return model_config.load_balancing_weight * jnp.sum(balance_Y)


def with_adapted(
    model_config: ModelConfig, before: Params, after: Params, routed: Routed
) -> Params:
    """The parameters `after` an update, and what is adjusted without a gradient."""
    values = adapted(model_config, before["layers"]["ffn"], routed)
    layers = after["layers"]
    return {**after, "layers": {**layers, "ffn": {**layers["ffn"], **values}}}


def make_gradients(
    model_config: ModelConfig, microbatches: int, is_straight_through: bool = False
) -> Callable[..., Any]:
    """Returns `(params, tokens_BxL+1, kept, by_cutoff) -> ((loss, how it was routed), gradients)`.

    With `microbatches` > 1 the gradient is accumulated over that many parts of the batch, one
    after another: the same gradient in less memory. Where tokens choose experts, the gradients
    include the load-balancing loss of every layer; the returned loss does not. `kept`, `by_cutoff`
    and `is_straight_through` are those of `Routing`. A dense model is not routed: None.
    """
    graph, _ = build(model_config)

    def loss_fn(
        params: Params, tokens_BxL1: Array, kept: Array | None, by_cutoff: Array | bool
    ) -> tuple[Array, tuple[Array, Routed | None]]:
        model = assemble(graph, params)
        routing = Routing(model_config.routing, None, kept, is_straight_through, by_cutoff)
        x_BxLxD, routed = model.hidden(tokens_BxL1[:, :-1], routing)
        loss = mean_loss(x_BxLxD, model.output_head(), tokens_BxL1[:, 1:])
        if routed is None or routed.balance is None:
            return loss, (loss, routed)
        return loss + auxiliary_loss(model_config, params, routed.balance), (loss, routed)

    def loss_and_gradients(
        params: Params,
        tokens_BxL1: Array,
        kept: Array | None = None,
        by_cutoff: Array | bool = False,
    ) -> tuple[tuple[Array, Any], Params]:
        differentiate = jax.value_and_grad(loss_fn, has_aux=True)
        (_, aux), gradients = differentiate(params, tokens_BxL1, kept, by_cutoff)
        return aux, gradients

    def accumulate(
        params: Params,
        tokens_BxL1: Array,
        kept: Array | None = None,
        by_cutoff: Array | bool = False,
    ) -> tuple[tuple[Array, Any], Params]:
        # Row b goes to microbatch b mod M: every device keeps its rows.
        tokens_MxBxL1 = tokens_BxL1.reshape(-1, microbatches, tokens_BxL1.shape[1]).swapaxes(0, 1)

        def add(sums: Any, tokens_BxL1: Array) -> tuple[Any, Any]:
            (loss, routed), gradients = loss_and_gradients(params, tokens_BxL1, kept, by_cutoff)
            return jax.tree.map(jnp.add, sums, (loss, gradients)), routed

        zeros = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
        sums, routed = jax.lax.scan(add, zeros, tokens_MxBxL1)
        loss, gradients = jax.tree.map(lambda total: total / microbatches, sums)
        if routed is not None:
            r_YxBxNxE = jnp.concatenate(routed.weights_BxNxE, axis=1)
            means = jax.tree.map(lambda x_MxY: jnp.mean(x_MxY, axis=0), routed[1:])
            routed = Routed(r_YxBxNxE, *means)
        return (loss, routed), gradients

    return loss_and_gradients if microbatches == 1 else accumulate


def make_train_step(
    model_config: ModelConfig,
    optimizer: Optimizer,
    mesh: Mesh,
    microbatches: int = 1,
    top_k: Schedule | None = None,
    is_straight_through: bool = False,
    threshold_warmup_end: int = 0,
) -> Callable[[State, Array], tuple[State, Metrics]]:
    """Returns `(state, tokens_BxL+1) -> (state, metrics)`; the state given is donated.

    `top_k` says how many experts each step's merges keep (top_k.py); None keeps
    `config.model.top_k_experts`. `is_straight_through` is that of `Routing`. Experts with
    thresholds take their share of the batch in the first `threshold_warmup_end` steps.

    If the loss or the gradient norm is NaN or infinite, only `step` advances: the rest of the state
    stays as it is, bit for bit, and `metrics["skipped"]` is 1.
    """
    compute = make_gradients(model_config, microbatches, is_straight_through)

    def train_step(state: State, tokens_BxL1: Array) -> tuple[State, Metrics]:
        kept = None if top_k is None else top_k(state["step"])
        by_cutoff = state["step"] < threshold_warmup_end
        (loss, routed), gradients = compute(state["params"], tokens_BxL1, kept, by_cutoff)
        with jax.named_scope("optimizer"):
            norm = optax.tree.norm(gradients)
            updates, opt_state = optimizer.update(
                gradients, state["opt_state"], state["params"], state["step"]
            )
            params = optax.apply_updates(state["params"], updates)
            is_finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        new: State = {"step": state["step"] + 1, "params": params, "opt_state": opt_state}
        metrics: Metrics = {"loss": loss, "grad_norm": norm}
        metrics["learning_rate"] = optimizer.schedule(state["step"])
        metrics["skipped"] = 1 - is_finite.astype(jnp.int32)
        if routed is not None:
            new["params"] = with_adapted(model_config, state["params"], params, routed)
            utilisation, new["last_active_YxE"] = routing_metrics(
                routed.weights_BxNxE, state["last_active_YxE"], new["step"]
            )
            metrics |= utilisation | sparse_metrics(routed)
            if kept is not None:
                metrics["experts_kept"] = kept
        # An elementwise select, fused into the loop that writes the new value anyway.
        kept = jax.tree.map(functools.partial(jnp.where, is_finite), new, state)
        return {**kept, "step": new["step"]}, metrics

    pinned = (state_shardings(model_config, optimizer, mesh), replicated(mesh))
    return jax.jit(train_step, donate_argnums=0, out_shardings=pinned)


def make_norms(model_config: ModelConfig, mesh: Mesh, microbatches: int) -> Callable[..., Any]:
    """Returns `(params, tokens_BxL+1) -> (norms of the parameters, norms of the gradients)`.

    Each leaf gets a float32 scalar, or `[Y]` if it is stacked over the layers. The norms show where
    NaN or infinite values first appeared.
    """
    compute = make_gradients(model_config, microbatches)

    def norms(tree: Params) -> Any:
        def norm(path: Any, leaf: Array) -> Array:
            is_stacked = path[0].key in ("layers", "dense_layers")
            axes = tuple(range(1 if is_stacked else 0, leaf.ndim))
            leaf = leaf.astype(jnp.float32)
            largest = jnp.max(jnp.abs(leaf), axis=axes, keepdims=True)
            scaled = leaf / jnp.where(largest > 0, largest, 1.0)  # so that squares do not overflow
            return jnp.sqrt(jnp.sum(jnp.square(scaled), axis=axes)) * jnp.squeeze(largest, axes)

        return jax.tree_util.tree_map_with_path(norm, tree)

    def both(params: Params, tokens_BxL1: Array) -> tuple[Any, Any]:
        _, gradients = compute(params, tokens_BxL1)
        return norms(params), norms(gradients)

    return jax.jit(both, out_shardings=replicated(mesh))


def make_loss_step(
    model_config: ModelConfig, mesh: Mesh, routing: str | None = None, prompt_length: int = 0
) -> Callable[[Any, Array], Array]:
    """Returns `(params, tokens_BxL+1) -> nll_BxL`, replicated, in nats.

    With `routing` None the loss is exactly that of training; "segment" and "prompt" route by a
    prompt of the first `prompt_length` tokens of every row. In training, tokens of a sparse
    baseline compete with each other, so measure such a model with "segment".
    """
    graph, _ = build(model_config)

    def loss_step(params: Params, tokens_BxL1: Array) -> Array:
        rule = None
        if routing is not None and model_config.num_experts:
            lengths_B = jnp.full(tokens_BxL1.shape[0], prompt_length)
            rule = Routing(routing, lengths_B)
        model = assemble(graph, params)
        x_BxLxD, _ = model.hidden(tokens_BxL1[:, :-1], rule)
        return token_losses(x_BxLxD, model.output_head(), tokens_BxL1[:, 1:])

    return jax.jit(loss_step, out_shardings=replicated(mesh))
