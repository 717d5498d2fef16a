"""The FFN of a layer: dense, merged from experts, or chosen among them.

Letters: B batch, L sequence, N segments, T tokens per segment, S = B * N, D model, F FFN,
E experts, U units that are routed (tokens, segments or rows), k experts per unit.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from lory_jax.model import routing as route
from lory_jax.model.config import ModelConfig
from lory_jax.model.experts import (
    AXES,
    BIAS_AXES,
    BIASES,
    DENSE_AXES,
    DENSE_BIAS_AXES,
    MATRICES,
)
from lory_jax.model.low_rank import FACTOR_AXES, low_rank_ffn, merge_low_rank
from lory_jax.model.merged_ffn import apply_ffn, merge_experts, merged_ffn
from lory_jax.model.parameters import Initializer
from lory_jax.model.routing import Routed, Routing
from lory_jax.model.routing_rules import DROPLESS, GATED, MERGED, SPARSE, TOKEN_CHOICE
from lory_jax.model.sparse import capacity, dropless, gated
from lory_jax.model.sparse.adaptation import declare_adapted
from lory_jax.parallel import constrain


class DenseFFN(nnx.Module):
    """The parameter-matched baseline, and the FFN of the dense warm-up."""

    gate: nnx.Param

    def __init__(self, init: Initializer, config: ModelConfig, output_scale: float):
        self.names = declare_dense(self, init, config, output_scale)

    def __call__(self, x_BxLxD: Array) -> Array:
        x_BxLxD = constrain(x_BxLxD, "moe_batch", "length", "activation_embed")
        ffn = {name: getattr(self, name)[...].astype(x_BxLxD.dtype) for name in self.names}
        with jax.named_scope("dense_ffn"):
            return apply_ffn(x_BxLxD, ffn)


def declare_dense(
    module: nnx.Module, init: Initializer, config: ModelConfig, output_scale: float
) -> tuple[str, ...]:
    """Declares a dense FFN's parameters in a module, and returns their names."""
    D, F, scale = config.embed_dim, config.mlp_dim, config.ffn_init_scale
    for name, (M, N) in {"gate": (D, F), "up": (D, F), "down": (F, D)}.items():
        own_scale = scale * output_scale if name == "down" else scale
        matrix = init.matrix((M, N), DENSE_AXES[name], fan_in=M, scale=own_scale)
        setattr(module, name, matrix)
    if not config.mlp_bias:
        return MATRICES
    for name, size in zip(BIASES, (F, F, D), strict=True):
        setattr(module, name, init.constant((size,), DENSE_BIAS_AXES[name], 0.0))
    return MATRICES + BIASES


class MergedFFN(nnx.Module):
    """E expert FFNs and their router, merged once per segment."""

    def __init__(self, init: Initializer, config: ModelConfig, output_scale: float):
        D, E = config.embed_dim, config.num_experts
        self.config = config
        self.router = init.matrix(
            (D, E), ("embed", "router_experts"), fan_in=D, scale=config.router_init_scale
        )
        self.declare_experts(init, output_scale)

    def declare_experts(self, init: Initializer, output_scale: float) -> None:
        """Declares the experts' parameters, and names them."""
        config = self.config
        D, F, E = config.embed_dim, config.mlp_dim, config.num_experts
        scale = config.expert_init_scale
        self.gate = init.matrix((E, D, F), AXES["gate"], fan_in=D, scale=scale)
        self.up = init.matrix((E, D, F), AXES["up"], fan_in=D, scale=scale)
        self.down = init.matrix((E, F, D), AXES["down"], fan_in=F, scale=scale * output_scale)
        self.names = MATRICES
        if config.mlp_bias:
            self.names += BIASES
            for name, size in zip(BIASES, (F, F, D), strict=True):
                setattr(self, name, init.constant((E, size), BIAS_AXES[name], 0.0))

    def experts(self) -> dict[str, Array]:
        """The experts in the layout of `merged_ffn`."""
        return {name: getattr(self, name)[...] for name in self.names}

    def routing_weights(self, h_BxLxD: Array, routing: Routing) -> Array:
        """`r_BxNxE` of this layer, float32; N is 1 for routing by prompt."""
        r_BxNxE = self._all_weights(h_BxLxD, routing)
        if routing.kept is not None:
            return route.keep_about(r_BxNxE, routing.kept, routing.is_straight_through)
        return route.keep_top_k(r_BxNxE, self.config.top_k_experts)

    def _all_weights(self, h_BxLxD: Array, routing: Routing) -> Array:
        config, lengths = self.config, routing.prompt_lengths_B
        if config.routing == "uniform":
            N = route.num_segments(h_BxLxD.shape[1], config.segment_length)
            N = 1 if routing.kind == "prompt" else N
            return jnp.full((len(h_BxLxD), N, config.num_experts), 1 / config.num_experts)
        with jax.named_scope("router"):
            if routing.kind in MERGED:
                rule = route.prefix_routing
                if routing.kind == "causal":
                    rule = functools.partial(route.causal_routing, source=config.routing_source)
                return rule(
                    h_BxLxD,
                    self.router[...],
                    config.segment_length,
                    config.first_segment_routing,
                )
            if lengths is None:
                raise ValueError(f"routing {routing.kind!r} requires prompt_lengths_B")
            if routing.kind == "prompt":
                return route.prompt_routing(h_BxLxD, self.router[...], lengths)
            if routing.kind == "segment":
                return route.segment_routing(
                    h_BxLxD,
                    self.router[...],
                    config.segment_length,
                    lengths,
                    config.routing_source,
                )
        raise ValueError(
            f"routing: got {routing.kind!r}; must be causal, prefix, prompt or segment"
        )

    def __call__(self, x_BxLxD: Array, routing: Routing) -> tuple[Array, Routed]:
        """Returns `[B, L, D]` and how it was routed."""
        x_BxLxD = constrain(x_BxLxD, "moe_batch", "length", "activation_embed")
        r_BxNxE = self.routing_weights(x_BxLxD, routing)
        if self.config.routing == "uniform":
            return self.averaged(x_BxLxD), Routed(r_BxNxE)
        return self.merge_and_apply(x_BxLxD, r_BxNxE, routing.kind), Routed(r_BxNxE)

    def merge_and_apply(self, x_BxLxD: Array, r_BxNxE: Array, kind: str) -> Array:
        """The output of every segment's merged FFN, or of the whole row's if `kind` is "prompt"."""
        B, L, D = x_BxLxD.shape
        N, E = r_BxNxE.shape[1:]
        T = L if kind == "prompt" else self.config.segment_length
        # One FFN for all L tokens of a row needs little merging, but is too large for the kernels.
        implementation = self.config.merged_ffn
        if kind == "prompt" and not self.config.mlp_bias:
            implementation = "blocks"
        x_BxNTxD = jnp.pad(x_BxLxD, ((0, 0), (0, N * T - L), (0, 0)))
        y_SxTxD = merged_ffn(
            x_BxNTxD.reshape(B * N, T, D),
            self.experts(),
            r_BxNxE.reshape(B * N, E),
            implementation,
            self.config.merged_ffn_group,
        )
        return y_SxTxD.reshape(B, N * T, D)[:, :L]

    def merged(self, r_RxE: Array) -> dict[str, Array]:
        """A dense FFN for each of these routing weights, in the compute type: `[R, D, F]` each."""
        dtype = self.config.compute_dtype
        return merge_experts({name: w.astype(dtype) for name, w in self.experts().items()}, r_RxE)

    def averaged(self, x_BxLxD: Array) -> Array:
        """The FFN of the experts' mean, which is merged once for all tokens."""
        mean = {
            name: jnp.mean(w, axis=0).astype(x_BxLxD.dtype) for name, w in self.experts().items()
        }
        with jax.named_scope("dense_ffn"):
            return apply_ffn(x_BxLxD, mean)


class LowRankFFN(MergedFFN):
    """One FFN that all experts share, and what each adds to it (low_rank.py)."""

    def declare_experts(self, init: Initializer, output_scale: float) -> None:
        config = self.config
        D, F, E, r = config.embed_dim, config.mlp_dim, config.num_experts, config.expert_rank
        self.names = declare_dense(self, init, config, output_scale)
        for name, (M, N) in {"gate": (D, F), "up": (D, F), "down": (F, D)}.items():
            a, b = f"{name}_a", f"{name}_b"
            setattr(self, a, init.matrix((E, M, r), FACTOR_AXES[a], fan_in=M))
            setattr(self, b, init.constant((E, r, N), FACTOR_AXES[b], 0.0))
        self.names += tuple(FACTOR_AXES)

    def merge_and_apply(self, x_BxLxD: Array, r_BxNxE: Array, kind: str) -> Array:
        """As with full experts, but without a merge: each token takes its segment's weights."""
        L = x_BxLxD.shape[1]
        T = L if kind == "prompt" else self.config.segment_length
        r_BxLxE = jnp.repeat(r_BxNxE, T, axis=1)[:, :L]
        return low_rank_ffn(x_BxLxD, self.experts(), r_BxLxE)

    def merged(self, r_RxE: Array) -> dict[str, Array]:
        """As with full experts."""
        dtype = self.config.compute_dtype
        return merge_low_rank({name: w.astype(dtype) for name, w in self.experts().items()}, r_RxE)

    def averaged(self, x_BxLxD: Array) -> Array:
        """The FFN of the experts' mean."""
        E = self.config.num_experts
        uniform_Bx1xE = jnp.full((len(x_BxLxD), 1, E), 1 / E)
        return self.merge_and_apply(x_BxLxD, uniform_Bx1xE, "prompt")


class SparseFFN(MergedFFN):
    """The same parameters in a sparse mixture (capacity.py): experts are chosen, not merged.

    Some rules have one parameter more, which is adjusted without a gradient (adaptation.py).
    """

    choice_bias: nnx.Param
    threshold: nnx.Param
    threshold_updates: nnx.Param

    def __init__(self, init: Initializer, config: ModelConfig, output_scale: float):
        super().__init__(init, config, output_scale)
        for name, parameter in declare_adapted(init, config).items():
            setattr(self, name, parameter)

    def __call__(self, x_BxLxD: Array, routing: Routing) -> tuple[Array, Routed]:
        """Returns `[B, L, D]` and how it was routed."""
        x_BxLxD = constrain(x_BxLxD, "moe_batch", "length", "activation_embed")
        config = self.config
        if config.routing in GATED:
            return self.gate_and_sum(x_BxLxD, routing)
        p_BxUxE = self.probabilities(x_BxLxD, routing)
        T = config.segment_length
        routed = Routed(route.segment_means(p_BxUxE, T) if config.routes_tokens else p_BxUxE)
        if routing.kind not in SPARSE:
            return self.choose(x_BxLxD, p_BxUxE), routed
        if config.routing in TOKEN_CHOICE:
            load_E = capacity.load(self.chosen(p_BxUxE)[1], config.num_experts)
            routed = routed._replace(load_E=load_E)
        if config.routing in DROPLESS:
            y_BxLxD = self.choose(x_BxLxD, p_BxUxE)
            balance: Array | None = capacity.load_balancing_loss(
                p_BxUxE.reshape(1, -1, config.num_experts)
            )
        else:
            with jax.named_scope("router"):
                slots, balance, dropped = capacity.assign(
                    p_BxUxE,
                    config.routing,
                    config.capacity_factor,
                    config.routing_group,
                    self.choice_bias_E(),
                )
            unit_length = 1 if config.routes_tokens else T
            y_BxLxD = capacity.slots_ffn(x_BxLxD, slots, self.experts(), unit_length)
            routed = routed._replace(dropped=dropped)
        y_BxLxD = constrain(y_BxLxD, "moe_batch", "length", "activation_embed")
        is_auxiliary = config.balancing == "auxiliary"
        return y_BxLxD, routed._replace(balance=balance if is_auxiliary else None)

    def gate_and_sum(self, x_BxLxD: Array, routing: Routing) -> tuple[Array, Routed]:
        """Where tokens have gates (gated.py): `[B, L, D]` and how it was routed."""
        config, k = self.config, self.config.experts_per_token
        is_training = routing.kind in SPARSE
        with jax.named_scope("router"):
            scores_BxLxE, balance, cutoff_E = gated.scores(x_BxLxD, self.router[...]), None, None
            if config.routing == "remoe":
                gates_BxLxE = jax.nn.relu(scores_BxLxE)
                balance = gated.l1_loss(gates_BxLxE, k) if is_training else None
            else:
                threshold_E = self.threshold[...]
                if is_training:
                    cutoff_E = gated.cutoffs(scores_BxLxE, k, config.routing_group)
                    threshold_E = jnp.where(routing.by_cutoff, cutoff_E, threshold_E)
                gates_BxLxE = gated.threshold_gates(scores_BxLxE, threshold_E)
            routed = Routed(gated.shares(gates_BxLxE, config.segment_length), balance)
            if is_training:
                routed = routed._replace(cutoff_E=cutoff_E)
                is_open_BxLxE = gates_BxLxE > 0
                dropped = jnp.mean(~jnp.any(is_open_BxLxE, axis=-1), dtype=jnp.float32)
                load_E = jnp.mean(is_open_BxLxE, axis=(0, 1), dtype=jnp.float32)
                routed = routed._replace(dropped=dropped, load_E=load_E)
        y_BxLxD = gated.gated_ffn(x_BxLxD, gates_BxLxE, self.experts(), config.grouped_product)
        return constrain(y_BxLxD, "moe_batch", "length", "activation_embed"), routed

    def probabilities(self, h_BxLxD: Array, routing: Routing) -> Array:
        """The router's probabilities of every unit: `[B, L, E]`, or of segments `[B, N, E]`."""
        if self.config.routes_tokens:
            with jax.named_scope("router"):
                return route.route(h_BxLxD, self.router[...])
        if routing.kind in SPARSE:
            return self.routing_weights(h_BxLxD, Routing("causal"))
        # Without a prompt BOS, which is always there, decides: equal weights choose nothing.
        assert routing.prompt_lengths_B is not None
        lengths_B = jnp.maximum(routing.prompt_lengths_B, 1)
        return self.routing_weights(h_BxLxD, Routing(routing.kind, lengths_B))

    def choice_bias_E(self) -> Array | None:
        """What balances the load without a loss; None for most rules."""
        has_bias = self.config.adapted_parameter == "choice_bias"
        return self.choice_bias[...] if has_bias else None

    def chosen(self, p_BxUxE: Array) -> tuple[Array, Array]:
        """The weights `[B, U, k]` of the experts that every unit chooses, and those experts."""
        return capacity.choose_experts(
            p_BxUxE,
            self.config.choices,
            is_shared=self.config.routing in TOKEN_CHOICE and self.config.choices > 1,
            bias_E=self.choice_bias_E(),
        )

    def choose(self, x_BxLxD: Array, p_BxUxE: Array) -> Array:
        """Sends every token through the most likely experts of its unit; returns `[B, L, D]`.

        There is one unit per token, one per segment, or one for the whole row.
        """
        L, U = x_BxLxD.shape[1], p_BxUxE.shape[1]
        T = {1: L, L: 1}.get(U, self.config.segment_length)
        weights_BxLxk, experts_BxLxk = (
            jnp.repeat(of_units, T, axis=1)[:, :L] for of_units in self.chosen(p_BxUxE)
        )
        return dropless.chosen_ffn(
            x_BxLxD, weights_BxLxk, experts_BxLxk, self.experts(), self.config.grouped_product
        )
