"""The FFN of a layer: dense, merged from experts, or chosen among them.

Letters: B batch, L sequence, N segments, T tokens per segment, S = B * N, D model, F FFN,
E experts, U units that are routed (tokens, segments or rows), k experts per unit.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from lory_jax.model import routing as route
from lory_jax.model.config import ModelConfig
from lory_jax.model.experts import AXES, DENSE_AXES
from lory_jax.model.merged_ffn import merged_ffn, swiglu
from lory_jax.model.parameters import Initializer
from lory_jax.model.routing import Routed, Routing
from lory_jax.model.routing_rules import MERGED, SPARSE
from lory_jax.model.sparse import capacity
from lory_jax.parallel import constrain


class DenseFFN(nnx.Module):
    """The parameter-matched baseline, and the FFN of the dense warm-up."""

    def __init__(self, init: Initializer, config: ModelConfig, output_scale: float):
        D, F = config.embed_dim, config.mlp_dim
        self.gate = init.matrix((D, F), DENSE_AXES["gate"], fan_in=D)
        self.up = init.matrix((D, F), DENSE_AXES["up"], fan_in=D)
        self.down = init.matrix((F, D), DENSE_AXES["down"], fan_in=F, scale=output_scale)

    def __call__(self, x_BxLxD: Array) -> Array:
        x_BxLxD = constrain(x_BxLxD, "moe_batch", "length", "activation_embed")
        weights = (w[...].astype(x_BxLxD.dtype) for w in (self.gate, self.up, self.down))
        with jax.named_scope("dense_ffn"):
            return swiglu(x_BxLxD, *weights)


class MergedFFN(nnx.Module):
    """E expert FFNs and their router, merged once per segment."""

    def __init__(self, init: Initializer, config: ModelConfig, output_scale: float):
        D, F, E = config.embed_dim, config.mlp_dim, config.num_experts
        self.config = config
        self.router = init.matrix(
            (D, E), ("embed", "router_experts"), fan_in=D, scale=config.router_init_scale
        )
        self.gate = init.matrix((E, D, F), AXES["gate"], fan_in=D)
        self.up = init.matrix((E, D, F), AXES["up"], fan_in=D)
        self.down = init.matrix((E, F, D), AXES["down"], fan_in=F, scale=output_scale)

    def experts(self) -> dict[str, Array]:
        """The experts in the layout of `merged_ffn`."""
        return {"gate": self.gate[...], "up": self.up[...], "down": self.down[...]}

    def routing_weights(self, h_BxLxD: Array, routing: Routing) -> Array:
        """`r_BxNxE` of this layer, float32; N is 1 for routing by prompt."""
        return route.keep_top_k(self._all_weights(h_BxLxD, routing), self.config.top_k_experts)

    def _all_weights(self, h_BxLxD: Array, routing: Routing) -> Array:
        config, lengths = self.config, routing.prompt_lengths_B
        with jax.named_scope("router"):
            if routing.kind in MERGED:
                rule = route.causal_routing if routing.kind == "causal" else route.prefix_routing
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
                    h_BxLxD, self.router[...], config.segment_length, lengths
                )
        raise ValueError(
            f"routing: got {routing.kind!r}; must be causal, prefix, prompt or segment"
        )

    def __call__(self, x_BxLxD: Array, routing: Routing) -> tuple[Array, Routed]:
        """Returns `[B, L, D]` and how it was routed."""
        x_BxLxD = constrain(x_BxLxD, "moe_batch", "length", "activation_embed")
        r_BxNxE = self.routing_weights(x_BxLxD, routing)
        B, L, D = x_BxLxD.shape
        N, E = r_BxNxE.shape[1:]
        T = L if routing.kind == "prompt" else self.config.segment_length
        x_BxNTxD = jnp.pad(x_BxLxD, ((0, 0), (0, N * T - L), (0, 0)))
        # One FFN for all L tokens of a row needs little merging, but is too large for the kernels.
        implementation = "blocks" if routing.kind == "prompt" else self.config.merged_ffn
        y_SxTxD = merged_ffn(
            x_BxNTxD.reshape(B * N, T, D),
            self.experts(),
            r_BxNxE.reshape(B * N, E),
            implementation,
        )
        return y_SxTxD.reshape(B, N * T, D)[:, :L], Routed(r_BxNxE)


class SparseFFN(MergedFFN):
    """The same parameters in a sparse mixture (capacity.py): experts are chosen, not merged."""

    def __call__(self, x_BxLxD: Array, routing: Routing) -> tuple[Array, Routed]:
        """Returns `[B, L, D]` and how it was routed."""
        x_BxLxD = constrain(x_BxLxD, "moe_batch", "length", "activation_embed")
        config = self.config
        p_BxUxE = self.probabilities(x_BxLxD, routing)
        T = config.segment_length
        routed = Routed(route.segment_means(p_BxUxE, T) if config.routes_tokens else p_BxUxE)
        if routing.kind not in SPARSE:
            return self.choose(x_BxLxD, p_BxUxE), routed
        with jax.named_scope("router"):
            slots, balance, dropped = capacity.assign(
                p_BxUxE, config.routing, config.capacity_factor, config.routing_group
            )
        unit_length = 1 if config.routes_tokens else T
        y_BxLxD = capacity.slots_ffn(x_BxLxD, slots, self.experts(), unit_length)
        y_BxLxD = constrain(y_BxLxD, "moe_batch", "length", "activation_embed")
        return y_BxLxD, routed._replace(balance=balance, dropped=dropped)

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

    def choose(self, x_BxLxD: Array, p_BxUxE: Array) -> Array:
        """Sends every token through the most likely experts of its unit; returns `[B, L, D]`.

        There is one unit per token, one per segment, or one for the whole row.
        """
        weights_BxUxk, experts_BxUxk = capacity.choose_experts(
            p_BxUxE, self.config.choices, is_shared=self.config.routing == "top2"
        )
        L, U = x_BxLxD.shape[1], p_BxUxE.shape[1]
        T = {1: L, L: 1}.get(U, self.config.segment_length)
        weights_BxLxk, experts_BxLxk = (
            jnp.repeat(of_units, T, axis=1)[:, :L] for of_units in (weights_BxUxk, experts_BxUxk)
        )
        return capacity.chosen_ffn(x_BxLxD, weights_BxLxk, experts_BxLxk, self.experts())
