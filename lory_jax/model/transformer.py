"""The decoder: LLaMA's, with every FFN replaced by merged experts (paper, section 2.2).

`Transformer` holds only `nnx.Param`s and is used functionally: `build` splits it once into a graph
definition and a plain nested dict of arrays, and `nnx.merge` puts them together inside a jitted
function.

Letters: B batch, L sequence, N segments, T tokens per segment, S = B * N, D model, F FFN,
E experts, V vocabulary, Y layers (of routing weights: those with experts).
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.experimental.layout import Layout, with_layout_constraint

from lory_jax.model.attention import Attention, Branches, blocked_attention, document_starts
from lory_jax.model.config import ModelConfig
from lory_jax.model.ffn import DenseFFN, LowRankFFN, MergedFFN, SparseFFN
from lory_jax.model.layer_order import run_layers
from lory_jax.model.parameters import Initializer
from lory_jax.model.remat import rematerialized
from lory_jax.model.routing import Routed, Routing
from lory_jax.model.token_deltas import TokenDeltas
from lory_jax.parallel import constrain, on_mesh, partition_spec

Params = dict[str, Any]
Stack = tuple[nnx.GraphDef, Any]  # the graph of a layer, and the parameters of several


class Block(nnx.Module):
    """One decoder layer: attention and FFN, each behind its norm and around its residual."""

    def __init__(self, init: Initializer, config: ModelConfig):
        self.config = config
        D = config.embed_dim
        # The residual stream is a sum over 2 * layers of outputs: keep its variance at 1.
        output_scale = (2 * config.num_layers) ** -0.5
        self.attention_norm = init.ones((D,), ("norm",))
        heads_on_tensor = config.attention_sharding == "heads"
        self.attention = Attention(
            init,
            D,
            config.num_heads,
            config.kv_heads,
            config.head_width,
            output_scale,
            config.attention_bias,
            heads_on_tensor,
        )
        self.ffn_norm = init.ones((D,), ("norm",))
        self.ffn = ffn_kind(config)(init, config, output_scale)
        if config.shared_expert:
            self.shared = DenseFFN(init, config, output_scale)
        if config.token_deltas:
            self.deltas = TokenDeltas(init, config)

    def __call__(
        self,
        x_BxLxD: Array,
        routing: Routing,
        branches: Branches | None = None,
        starts_BxL: Array | None = None,
    ) -> tuple[Array, Routed | None]:
        """Returns `[B, L, D]` and how the layer was routed, None for a dense layer."""
        x_BxLxD = constrain(x_BxLxD, self.config.batch_axis, "length", "activation_embed")
        x_BxLxD = self.by_rows(x_BxLxD)
        with jax.named_scope("attention"):
            h_BxLxD = rms_norm(x_BxLxD, self.attention_norm[...], self.config.norm_epsilon)
            x_BxLxD = self.by_rows(x_BxLxD + self.attend(h_BxLxD, branches, starts_BxL))
        with jax.named_scope("ffn"):
            h_BxLxD = rms_norm(x_BxLxD, self.ffn_norm[...], self.config.norm_epsilon)
            if isinstance(self.ffn, DenseFFN):
                return x_BxLxD + self.with_others(self.ffn(h_BxLxD), h_BxLxD), None
            y_BxLxD, routed = self.ffn(h_BxLxD, routing)
            return x_BxLxD + self.with_others(y_BxLxD, h_BxLxD), routed

    def with_others(self, y_BxLxD: Array, h_BxLxD: Array) -> Array:
        """The FFN's output and that of what stands beside it and reads the same."""
        if self.config.shared_expert:
            y_BxLxD = y_BxLxD + self.shared(h_BxLxD)
        if self.config.token_deltas:
            h_BxLxD = constrain(h_BxLxD, "moe_batch", "length", "activation_embed")
            y_BxLxD = y_BxLxD + self.deltas(h_BxLxD)
        return y_BxLxD

    def attend(self, h_BxLxD: Array, branches: Branches | None, starts_BxL: Array | None) -> Array:
        """Causal self-attention: across documents, or inside those that begin at `starts_BxL`.

        Positions count from the beginning of the row either way.
        """
        attention, rope = self.attention, self.config.rope
        if branches:
            query, key, value = attention.project(h_BxLxD, branches.positions_BxL, rope)
            return attention.combine(
                blocked_attention(query, key, value, branches.branch_BxL, starts_BxL)
            )
        return attention(h_BxLxD, rope, self.config.attention, starts_BxL)

    def by_rows(self, x_BxLxD: Array) -> Array:
        """Keeps the residual stream row by row in memory, around the kernels of a TPU.

        Left alone, the compiler puts L on the lanes, and transposes for every norm and kernel. Each
        device pins its own part: the partitioner does not look through a pinned layout, and would
        gather whole batches.
        """
        if self.config.attention not in ("splash", "paired"):
            return x_BxLxD
        spec = partition_spec((self.config.batch_axis, "length", "activation_embed"))

        def pin(x_BxLxD: Array) -> Array:
            return with_layout_constraint(x_BxLxD, Layout((0, 1, 2)))

        return on_mesh(pin, spec, spec)(x_BxLxD)


def ffn_kind(config: ModelConfig) -> type[DenseFFN | MergedFFN]:
    """What the FFNs of a model's `layers` are."""
    if not config.num_experts:
        return DenseFFN
    if config.is_sparse:
        return SparseFFN
    return LowRankFFN if config.expert_rank else MergedFFN


class Transformer(nnx.Module):
    """Token embedding, a stack of blocks, a final norm and an output head, which may be tied."""

    def __init__(self, config: ModelConfig, key: Array):
        self.config = config
        init = Initializer(key)
        V, D = config.vocab_size, config.embed_dim
        self.embedding = init.matrix((V, D), ("vocab", "embed"), fan_in=D)
        self.layers = Block(init.stacked(len(config.layer_numbers)), config)
        self.final_norm = init.ones((D,), ("norm",))
        if not config.tie_embeddings:
            self.head = init.matrix((D, V), ("embed", "vocab"), fan_in=D)
        if config.dense_layer_numbers:
            dense = dataclasses.replace(config, num_experts=0)
            self.dense_layers = Block(init.stacked(len(config.dense_layer_numbers)), dense)

    def stacks(self) -> tuple[Stack, Stack]:
        """`layers`, and `dense_layers`, whose parameters are None unless some have no experts."""
        layers = nnx.split(self.layers)
        has_dense = bool(self.config.dense_layer_numbers)
        return layers, nnx.split(self.dense_layers) if has_dense else (layers[0], None)

    def output_head(self) -> Array:
        """`[D, V]`: a parameter of its own, or the embedding's."""
        return self.embedding[...].T if self.config.tie_embeddings else self.head[...]

    def embed(self, tokens_BxL: Array) -> Array:
        """`[B, L, D]` in the compute type."""
        with jax.named_scope("embedding"):
            # Gathered whole, so that every device looks up its own tokens: a table that is sharded
            # over both its axes makes the compiler replicate the activations instead.
            table_VxD = constrain(self.embedding[...], "whole", "activation_embed")
            x_BxLxD = table_VxD[tokens_BxL].astype(self.config.compute_dtype)
            return constrain(x_BxLxD, self.config.batch_axis, "length", "activation_embed")

    def unembed(self, x_BxLxD: Array) -> Array:
        """Float32 logits `[B, L, V]` of what `hidden` returns."""
        with jax.named_scope("head"):
            logits_BxLxV = jnp.einsum(
                "bld,dv->blv",
                x_BxLxD,
                self.output_head().astype(x_BxLxD.dtype),
                preferred_element_type=jnp.float32,
            )
            return constrain(logits_BxLxV, "moe_batch", "length", "vocab")

    def __call__(
        self, tokens_BxL: Array, routing: Routing | None = None
    ) -> tuple[Array, Array | None]:
        """Float32 logits `[B, L, V]` and routing weights `[Y, B, N, E]` (None: dense)."""
        x_BxLxD, routed = self.hidden(tokens_BxL, routing)
        return self.unembed(x_BxLxD), routed.weights_BxNxE if routed else None

    def hidden(
        self,
        tokens_BxL: Array,
        routing: Routing | None = None,
        branches: Branches | None = None,
    ) -> tuple[Array, Routed | None]:
        """A full forward pass up to the head.

        Args:
          tokens_BxL: token ids.
          routing: how to route; None is `config.routing`, as in training.
          branches: where rows hold several continuations sharing a prefix.

        Returns:
          `[B, L, D]` after the final norm, in the compute type, and how every layer was routed
          (None for a dense model).
        """
        x_BxLxD = self.embed(tokens_BxL)
        (graph, layers), (dense_graph, dense_layers) = self.stacks()
        routing = routing or Routing(self.config.routing)
        starts_BxL = None
        if self.config.document_mask:
            branch_BxL = branches.branch_BxL if branches else None
            starts_BxL = document_starts(tokens_BxL, self.config.bos_id, branch_BxL)

        def run_layer(x_BxLxD: Array, layer: Params, is_dense: bool) -> tuple[Array, Any]:
            @functools.partial(rematerialized, policy=self.config.remat)
            def run(x_BxLxD: Array, layer: Params) -> tuple[Array, Routed | None]:
                block = nnx.merge(dense_graph if is_dense else graph, layer)
                return block(x_BxLxD, routing, branches, starts_BxL)

            return run(x_BxLxD, layer)

        x_BxLxD, routed, _ = run_layers(self.config, run_layer, x_BxLxD, layers, dense_layers)
        return self.normalize(x_BxLxD), routed

    def normalize(self, x_BxLxD: Array) -> Array:
        """The final norm, laid out for the head."""
        x_BxLxD = constrain(x_BxLxD, "moe_batch", "length", "activation_embed")
        return rms_norm(x_BxLxD, self.final_norm[...], self.config.norm_epsilon)


def rms_norm(x_xD: Array, scale_D: Array, epsilon: float) -> Array:
    """x / sqrt(mean(x^2) + epsilon) * scale, computed in float32, in the type of x."""
    x32_xD = x_xD.astype(jnp.float32)
    mean_square_x1 = jnp.mean(x32_xD**2, axis=-1, keepdims=True)
    scale_xD = jnp.broadcast_to(scale_D, x_xD.shape)
    return (x32_xD * jax.lax.rsqrt(mean_square_x1 + epsilon) * scale_xD).astype(x_xD.dtype)


def build(config: ModelConfig) -> tuple[nnx.GraphDef, Params]:
    """The graph definition and, for every parameter, its logical axes; allocates nothing."""
    abstract = nnx.eval_shape(lambda: Transformer(config, jax.random.key(0)))
    graph, state = nnx.split(abstract)
    axes = jax.tree.map(
        lambda variable: variable.axes,
        nnx.to_pure_dict(state, extract_fn=lambda variable: variable),
        is_leaf=lambda node: isinstance(node, nnx.Variable),
    )
    return graph, axes


def init_params(config: ModelConfig, key: Array) -> Params:
    """Float32 parameters from a key, as a plain nested dict."""
    return nnx.to_pure_dict(nnx.state(Transformer(config, key)))


def assemble(graph: nnx.GraphDef, params: Params) -> Transformer:
    """The module with these parameters, for use inside a jitted function."""
    return nnx.merge(graph, params)
