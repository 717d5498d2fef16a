"""The decoder: LLaMA's, with every FFN replaced by merged experts (paper, section 2.2).

`Transformer` holds only `nnx.Param`s and is used functionally: `build` splits it once into a graph
definition and a plain nested dict of arrays, and `nnx.merge` puts them together inside a jitted
function.

Letters: B batch, L sequence, N segments, T tokens per segment, S = B * N, D model, F FFN,
E experts, V vocabulary, Y layers.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from lory_jax.model import baselines
from lory_jax.model import routing as route
from lory_jax.model.attention import (
    SAVED,
    Attention,
    Rope,
    causal_attention,
    resolve_attention,
)
from lory_jax.model.merged_ffn import merged_ffn, resolve_merged_ffn, swiglu
from lory_jax.model.parameters import Initializer
from lory_jax.model.routing import Routed, Routing
from lory_jax.parallel import constrain

Params = dict[str, Any]


@dataclass(frozen=True)
class ModelConfig:
    """The fields of `config.model`; `lory_jax.config.SCHEMA` says what each means.

    `top_k_experts` is no field of a recipe: training merges all experts. Of a trained model, only
    the k largest routing weights are kept, renormalised; 0 keeps all.
    """

    vocab_size: int
    num_layers: int
    embed_dim: int
    num_heads: int
    mlp_dim: int
    num_experts: int
    sequence_length: int
    segment_length: int
    routing: str = "causal"
    first_segment_routing: str = "self"
    capacity_factor: float = 1.0
    routing_group: int = 0
    load_balancing_weight: float = 0.01
    router_init_scale: float = 0.23
    num_kv_heads: int = 0
    tie_embeddings: bool = False
    rope_theta: float = 10_000.0
    rope_scaling: str = "none"
    rope_factor: float = 1.0
    rope_low_frequency_factor: float = 1.0
    rope_high_frequency_factor: float = 4.0
    rope_original_length: int = 8192
    norm_epsilon: float = 1e-5
    compute_dtype: str = "float32"
    remat: str = "none"
    attention: str = "xla"
    merged_ffn: str = "blocks"
    attention_sharding: str = "batch"
    scan_layers: bool = True
    top_k_experts: int = 0

    @classmethod
    def for_platform(cls, fields: Mapping[str, Any], platform: str) -> "ModelConfig":
        """`config.model` with what is "auto" resolved for where it will run (cpu, gpu or tpu).

        Raises:
          ConfigError: the platform cannot run the implementation asked for.
        """
        attention = resolve_attention(fields["attention"], platform, fields["compute_dtype"])
        # As many heads of keys as of queries, said in one way: equal models have equal configs.
        grouped = fields.get("num_kv_heads", 0)
        num_kv_heads = 0 if grouped == fields["num_heads"] else grouped
        ffn = fields["merged_ffn"]
        if fields["num_experts"]:
            ffn = resolve_merged_ffn(
                ffn,
                platform,
                fields["segment_length"],
                fields["embed_dim"],
                fields["num_experts"],
                jnp.dtype(fields["compute_dtype"]).itemsize,
            )
        resolved = {"attention": attention, "merged_ffn": ffn, "num_kv_heads": num_kv_heads}
        return cls(**{**fields, **resolved})

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values G."""
        return self.num_kv_heads or self.num_heads

    @property
    def rope(self) -> Rope:
        """The settings of the rotary embedding."""
        return Rope(
            self.rope_theta,
            self.rope_scaling,
            self.rope_factor,
            self.rope_low_frequency_factor,
            self.rope_high_frequency_factor,
            self.rope_original_length,
        )

    @property
    def batch_axis(self) -> str:
        """The logical axis of the batch outside the FFN and the head."""
        return "batch" if self.attention_sharding == "batch" else "moe_batch"

    @property
    def is_sparse(self) -> bool:
        """Whether experts are chosen (see baselines.py) rather than merged."""
        return self.num_experts > 0 and self.routing in baselines.SPARSE

    @property
    def routes_tokens(self) -> bool:
        """Whether every token is routed by itself, rather than with its segment or prompt."""
        return self.is_sparse and self.routing != "expert_choice_segment"

    @property
    def choices(self) -> int:
        """Experts per token: what it chooses, or what expert choice gives it on average."""
        return baselines.TOKEN_CHOICE.get(self.routing) or max(1, round(self.capacity_factor))

    @property
    def measured_routing(self) -> str | None:
        """What losses are measured with: None is training's own, which leaks where it is sparse."""
        return "segment" if self.is_sparse else None


class DenseFFN(nnx.Module):
    """The parameter-matched baseline, and the FFN of the dense warm-up."""

    def __init__(self, init: Initializer, config: ModelConfig, output_scale: float):
        D, F = config.embed_dim, config.mlp_dim
        self.gate = init.matrix((D, F), ("embed", "mlp"), fan_in=D)
        self.up = init.matrix((D, F), ("embed", "mlp"), fan_in=D)
        self.down = init.matrix((F, D), ("mlp", "embed"), fan_in=F, scale=output_scale)

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
        self.gate = init.matrix((E, D, F), ("experts", "embed", "mlp"), fan_in=D)
        self.up = init.matrix((E, D, F), ("experts", "embed", "mlp"), fan_in=D)
        self.down = init.matrix(
            (E, F, D), ("experts", "mlp", "embed"), fan_in=F, scale=output_scale
        )

    def experts(self) -> dict[str, Array]:
        """The experts in the layout of `merged_ffn`."""
        return {"gate": self.gate[...], "up": self.up[...], "down": self.down[...]}

    def routing_weights(self, h_BxLxD: Array, routing: Routing) -> Array:
        """`r_BxNxE` of this layer, float32; N is 1 for routing by prompt."""
        return route.keep_top_k(self._all_weights(h_BxLxD, routing), self.config.top_k_experts)

    def _all_weights(self, h_BxLxD: Array, routing: Routing) -> Array:
        config, lengths = self.config, routing.prompt_lengths_B
        with jax.named_scope("router"):
            if routing.kind in ("causal", "prefix"):
                rule = route.causal_routing if routing.kind == "causal" else route.prefix_routing
                return rule(
                    h_BxLxD,
                    self.router[...],
                    config.segment_length,
                    config.first_segment_routing,
                )
            if lengths is None:
                raise ValueError(f"routing {routing.kind!r} needs prompt_lengths_B")
            if routing.kind == "prompt":
                return route.prompt_routing(h_BxLxD, self.router[...], lengths)
            if routing.kind == "segment":
                return route.segment_routing(
                    h_BxLxD, self.router[...], config.segment_length, lengths
                )
        raise ValueError(f"routing: got {routing.kind!r}, takes causal, prefix, prompt or segment")

    def __call__(self, x_BxLxD: Array, routing: Routing) -> tuple[Array, Routed]:
        """Returns `[B, L, D]` and how it was routed."""
        x_BxLxD = constrain(x_BxLxD, "moe_batch", "length", "activation_embed")
        r_BxNxE = self.routing_weights(x_BxLxD, routing)
        B, L, D = x_BxLxD.shape
        N, E = r_BxNxE.shape[1:]
        T = L if routing.kind == "prompt" else self.config.segment_length
        x_BxNTxD = jnp.pad(x_BxLxD, ((0, 0), (0, N * T - L), (0, 0)))
        # One FFN for all L tokens of a row: little merging, and more than the kernels hold at once.
        implementation = "blocks" if routing.kind == "prompt" else self.config.merged_ffn
        y_SxTxD = merged_ffn(
            x_BxNTxD.reshape(B * N, T, D),
            self.experts(),
            r_BxNxE.reshape(B * N, E),
            implementation,
        )
        return y_SxTxD.reshape(B, N * T, D)[:, :L], Routed(r_BxNxE)


class SparseFFN(MergedFFN):
    """The same parameters in a sparse mixture (baselines.py): experts are chosen, not merged."""

    def __call__(self, x_BxLxD: Array, routing: Routing) -> tuple[Array, Routed]:
        """Returns `[B, L, D]` and how it was routed."""
        x_BxLxD = constrain(x_BxLxD, "moe_batch", "length", "activation_embed")
        config = self.config
        p_BxUxE = self.probabilities(x_BxLxD, routing)
        T = config.segment_length
        routed = Routed(route.segment_means(p_BxUxE, T) if config.routes_tokens else p_BxUxE)
        if routing.kind not in baselines.SPARSE:
            return self.choose(x_BxLxD, p_BxUxE), routed
        with jax.named_scope("router"):
            slots, balance, dropped = baselines.assign(
                p_BxUxE, config.routing, config.capacity_factor, config.routing_group
            )
        unit_length = 1 if config.routes_tokens else T
        y_BxLxD = baselines.slots_ffn(x_BxLxD, slots, self.experts(), unit_length)
        y_BxLxD = constrain(y_BxLxD, "moe_batch", "length", "activation_embed")
        return y_BxLxD, routed._replace(balance=balance, dropped=dropped)

    def probabilities(self, h_BxLxD: Array, routing: Routing) -> Array:
        """The router's probabilities of every unit: `[B, L, E]`, or of segments `[B, N, E]`."""
        if self.config.routes_tokens:
            with jax.named_scope("router"):
                return route.route(h_BxLxD, self.router[...])
        if routing.kind in baselines.SPARSE:
            return self.routing_weights(h_BxLxD, Routing("causal"))
        # Without a prompt BOS decides, which is always there: equal weights would choose nothing.
        assert routing.prompt_lengths_B is not None
        lengths_B = jnp.maximum(routing.prompt_lengths_B, 1)
        return self.routing_weights(h_BxLxD, Routing(routing.kind, lengths_B))

    def choose(self, x_BxLxD: Array, p_BxUxE: Array) -> Array:
        """Every token through the experts that its unit finds most likely: `[B, L, D]`.

        There is a unit per token, per segment, or one for all.
        """
        weights_BxUxk, experts_BxUxk = baselines.choose_experts(
            p_BxUxE, self.config.choices, is_shared=self.config.routing == "top2"
        )
        L, U = x_BxLxD.shape[1], p_BxUxE.shape[1]
        T = {1: L, L: 1}.get(U, self.config.segment_length)
        weights_BxLxk, experts_BxLxk = (
            jnp.repeat(of_units, T, axis=1)[:, :L] for of_units in (weights_BxUxk, experts_BxUxk)
        )
        return baselines.chosen_ffn(x_BxLxD, weights_BxLxk, experts_BxLxk, self.experts())


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
            init, D, config.num_heads, config.kv_heads, output_scale, heads_on_tensor
        )
        self.ffn_norm = init.ones((D,), ("norm",))
        kind = SparseFFN if config.is_sparse else MergedFFN if config.num_experts else DenseFFN
        self.ffn = kind(init, config, output_scale)

    def __call__(self, x_BxLxD: Array, routing: Routing) -> tuple[Array, Routed | None]:
        """Returns `[B, L, D]` and how the layer was routed, None for a dense layer."""
        x_BxLxD = constrain(x_BxLxD, self.config.batch_axis, "length", "activation_embed")
        with jax.named_scope("attention"):
            h_BxLxD = rms_norm(x_BxLxD, self.attention_norm[...], self.config.norm_epsilon)
            x_BxLxD = x_BxLxD + self.attend(h_BxLxD)
        with jax.named_scope("ffn"):
            h_BxLxD = rms_norm(x_BxLxD, self.ffn_norm[...], self.config.norm_epsilon)
            if isinstance(self.ffn, DenseFFN):
                return x_BxLxD + self.ffn(h_BxLxD), None
            y_BxLxD, routed = self.ffn(h_BxLxD, routing)
            return x_BxLxD + y_BxLxD, routed

    def attend(self, h_BxLxD: Array) -> Array:
        """Causal self-attention over the whole sequence, document borders included."""
        config, (B, L, _) = self.config, h_BxLxD.shape
        positions_BxL = jnp.broadcast_to(jnp.arange(L), (B, L))
        query, key, value = self.attention.project(h_BxLxD, positions_BxL, config.rope)
        return self.attention.combine(
            causal_attention(
                query,
                key,
                value,
                config.attention,
                config.batch_axis,
                "heads" if config.attention_sharding == "batch" else "tensor_heads",
            )
        )


class Transformer(nnx.Module):
    """Token embedding, a stack of blocks, a final norm and an output head, which may be tied."""

    def __init__(self, config: ModelConfig, key: Array):
        self.config = config
        init = Initializer(key)
        V, D = config.vocab_size, config.embed_dim
        self.embedding = init.matrix((V, D), ("vocab", "embed"), fan_in=D)
        self.layers = Block(init.stacked(config.num_layers), config)
        self.final_norm = init.ones((D,), ("norm",))
        if not config.tie_embeddings:
            self.head = init.matrix((D, V), ("embed", "vocab"), fan_in=D)

    def output_head(self) -> Array:
        """`[D, V]`: a parameter of its own, or the embedding's."""
        return self.embedding[...].T if self.config.tie_embeddings else self.head[...]

    def embed(self, tokens_BxL: Array) -> Array:
        """`[B, L, D]` in the compute type."""
        with jax.named_scope("embedding"):
            # Gathered whole, so that every device looks its own tokens up: a table that is sharded
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
        self, tokens_BxL: Array, routing: Routing | None = None
    ) -> tuple[Array, Routed | None]:
        """A full forward pass up to the head.

        Args:
          tokens_BxL: token ids.
          routing: how to route; None is `config.routing`, as in training.

        Returns:
          `[B, L, D]` after the final norm, in the compute type, and how every layer was routed
          (None for a dense model).
        """
        x_BxLxD = self.embed(tokens_BxL)
        graph, layers = nnx.split(self.layers)
        routing = routing or Routing(self.config.routing)

        @functools.partial(_remat, policy=self.config.remat)
        def run_layer(x_BxLxD: Array, layer: Params) -> tuple[Array, Routed | None]:
            return nnx.merge(graph, layer)(x_BxLxD, routing)

        if self.config.scan_layers:
            x_BxLxD, routed = jax.lax.scan(run_layer, x_BxLxD, layers)
        else:
            of_layers = []
            for y in range(self.config.num_layers):
                x_BxLxD, of_layer = run_layer(x_BxLxD, jax.tree.map(lambda w, y=y: w[y], layers))
                of_layers.append(of_layer)
            routed = jax.tree.map(lambda *parts: jnp.stack(parts), *of_layers)
        return self.normalize(x_BxLxD), routed

    def normalize(self, x_BxLxD: Array) -> Array:
        """The final norm, laid out for the head."""
        x_BxLxD = constrain(x_BxLxD, "moe_batch", "length", "activation_embed")
        return rms_norm(x_BxLxD, self.final_norm[...], self.config.norm_epsilon)


def rms_norm(x_xD: Array, scale_D: Array, epsilon: float) -> Array:
    """x / sqrt(mean(x^2) + epsilon) * scale, computed in float32, in the type of x."""
    x32_xD = x_xD.astype(jnp.float32)
    mean_square_x1 = jnp.mean(x32_xD**2, axis=-1, keepdims=True)
    return (x32_xD * jax.lax.rsqrt(mean_square_x1 + epsilon) * scale_D).astype(x_xD.dtype)


def _remat(function: Any, policy: str) -> Any:
    """What the backward pass keeps of a layer: everything, matrix products only, or its input."""
    if policy == "none":
        return function
    if policy == "dots":
        # Merged weights are matrix products too, but with a batch dimension: not kept.
        policies = jax.checkpoint_policies
        kept = policies.save_from_both_policies(
            policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names(SAVED)
        )
        return jax.checkpoint(function, policy=kept)
    if policy == "full":
        return jax.checkpoint(function)
    raise ValueError(f"remat: got {policy!r}, takes none, dots or full")


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


def merge_params(graph: nnx.GraphDef, params: Params) -> Transformer:
    """The module with these parameters, for use inside a jitted function."""
    return nnx.merge(graph, params)
