"""The three compiled programs of decoding: read the prompts, take one step, merge again.

`prefill` reads the prompts in one pass. In every layer it computes the routing weights and merges
the experts by them. It returns the weights of a dense LLaMA, layer by layer, in the compute type:
`step` is that model's step with a KV cache, the same program whether an FFN was merged or trained.
Rows with different prompts have an FFN each; rows that share the routing share one.

Routing by prompt (paper, section 2.2: inference) merges only once. Routing by segment (its table 9)
merges again at every segment border: `remerge` only requires the hidden states of the segment that
has just ended, whose sums `step` keeps.

Layers are unrolled. A scan would copy the weights and the cache of every layer out of their stacks
in every step, which doubles the time of a step on a CPU.

On a mesh, weights keep their sharding from training (embed on `fsdp`, mlp on `tensor`) and
activations are moved between devices, so any batch size works.

Letters: B batch, P padded prompt length, M positions in the cache, Y layers, D model, F FFN,
H heads, G heads of keys and values, K head width, V vocabulary, E experts, T tokens per segment,
R rows that own an FFN (B, or 1 that all share).

The sparse baselines merge nothing. Where tokens are routed, `step` is the trained model's own;
where segments are routed, each row keeps its distribution over experts.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from lory_jax.generation.settings import check_routing
from lory_jax.model.attention import attend, blocked_attention, document_starts
from lory_jax.model.config import ModelConfig
from lory_jax.model.ffn import DenseFFN, MergedFFN, SparseFFN
from lory_jax.model.merged_ffn import apply_ffn, merge_experts
from lory_jax.model.routing import Routing, keep_top_k, route
from lory_jax.model.routing_rules import ADAPTED
from lory_jax.model.transformer import Params, Transformer, assemble, build, rms_norm
from lory_jax.parallel import partition_spec

CACHE_AXES = ("fsdp", "tensor")  # mesh axes that shard the heads of keys, if they divide


class Cache(NamedTuple):
    """The state of a batch being decoded; one array per layer in each tuple.

    positions_B: the position of each row's next token.
    starts_B: the position at which each row's document begins; None without a document mask.
    keys, values: `[B, G, M, K]` of the positions so far, in the compute type.
    probabilities: float32 `[B, E]`, the router's probabilities in the current segment, for the
      baseline whose segments choose experts; otherwise None.
    totals: float32 `[B, D]`, sums of the FFN inputs over the current segment; None where segments
      do not route.
    """

    positions_B: Array
    starts_B: Array | None
    keys: tuple[Array, ...]
    values: tuple[Array, ...]
    probabilities: tuple[Array, ...] | None
    totals: tuple[Array, ...] | None


class Decoder(NamedTuple):
    """The programs; those that read a cache donate it.

    prefill: `(params, tokens_BxP, lengths_B, M, shared)` to the logits after each prompt, the
      weights and the cache. `shared` says that row 0 routes all rows.
    step: `(weights, cache, tokens_B)` to the logits after those tokens and the cache.
    remerge: `(params, weights, cache)` to the weights and the cache, the FFNs of rows at a segment
      border merged anew.
    """

    prefill: Callable[[Params, ArrayLike, ArrayLike, int, bool], tuple[Array, Params, Cache]]
    step: Callable[[Params, Cache, Array], tuple[Array, Cache]]
    remerge: Callable[[Params, Params, Cache], tuple[Params, Cache]]


@functools.lru_cache(maxsize=8)
def make_decoder(config: ModelConfig, routing: str, mesh: Mesh | None = None) -> Decoder:
    """The programs that decode with a model, routed by "prompt" or by "segment".

    `mesh` is the one the parameters are on; None is a single device.
    """
    check_routing(routing)
    graph, _ = build(config)
    kept = config
    if not config.is_sparse:
        kept = dataclasses.replace(config, num_experts=0, top_k_experts=0)
    served = functools.partial(_served, kept, mesh)
    T, epsilon, rope = config.segment_length, config.norm_epsilon, config.rope
    has_segments = config.num_experts > 0 and not config.routes_tokens
    reroutes = routing == "segment" and has_segments and config.routing != "uniform"

    # ------------------------------------------------------------------ the prompt, in one pass
    def prefill(
        params: Params, tokens_BxP: Array, lengths_B: Array, cache_length: int, shared: bool
    ) -> tuple[Array, Params, Cache]:
        model = assemble(graph, params)
        layer_graph, layers = _split_layers(model)
        B, P = tokens_BxP.shape
        positions_BxP = jnp.broadcast_to(jnp.arange(P), (B, P))
        starts_BxP = document_starts(tokens_BxP, config.bos_id) if config.document_mask else None

        def to_cache(x_BxPxGxK: Array) -> Array:
            padding = ((0, 0), (0, cache_length - P), (0, 0), (0, 0))
            return jnp.pad(x_BxPxGxK, padding).swapaxes(1, 2)

        def run_layer(x_BxPxD: Array, layer: Params) -> tuple[Array, Any]:
            block = nnx.merge(layer_graph, layer)
            h_BxPxD = rms_norm(x_BxPxD, block.attention_norm[...], epsilon)
            query, key, value = block.attention.project(h_BxPxD, positions_BxP, rope)
            heads_BxPxHxK = blocked_attention(query, key, value, starts_BxL=starts_BxP)
            x_BxPxD += block.attention.combine(heads_BxPxHxK)
            h_BxPxD = rms_norm(x_BxPxD, block.ffn_norm[...], epsilon)
            y_BxPxD, merged = _prompt_ffn(block.ffn, h_BxPxD, routing, lengths_B, shared)
            total_BxD = _running_total(h_BxPxD, lengths_B, T) if reroutes else None
            return x_BxPxD + y_BxPxD, (to_cache(key), to_cache(value), merged, total_BxD)

        x_BxPxD, (key, value, merged, total) = jax.lax.scan(
            run_layer, model.embed(tokens_BxP), layers
        )
        last_Bx1xD = x_BxPxD[jnp.arange(B), lengths_B - 1][:, None]
        cache = Cache(
            lengths_B,
            None if starts_BxP is None else starts_BxP[jnp.arange(B), lengths_B - 1],
            _pin_cache(_unstack(key), mesh),
            _pin_cache(_unstack(value), mesh),
            _unstack(merged) if config.is_sparse and has_segments else None,
            None if total is None else _unstack(total),
        )
        is_merged = has_segments and not config.is_sparse
        weights = served(params, merged if is_merged else params["layers"]["ffn"])
        return model.unembed(model.normalize(last_Bx1xD))[:, 0], weights, cache

    # ------------------------------------------------------------------ one token of every row
    kept_graph, _ = build(kept)
    stack = nnx.eval_shape(lambda: Transformer(kept, jax.random.key(0)))
    block_graph, _ = _split_layers(stack)

    def step(weights: Params, cache: Cache, tokens_B: Array) -> tuple[Array, Cache]:
        # The stacked layers are not used here, so any single layer can take their place.
        model = assemble(kept_graph, {**weights, "layers": weights["layers"][0]})
        positions_B = cache.positions_B
        M = cache.keys[0].shape[-2]
        starts_B = cache.starts_B
        mask_BxM = jnp.arange(M)[None] <= positions_B[:, None]
        if starts_B is not None:
            starts_B = jnp.where(tokens_B == config.bos_id, positions_B, starts_B)
            mask_BxM &= jnp.arange(M)[None] >= starts_B[:, None]
        mask_Bx1x1xM = mask_BxM[:, None, None]
        x_Bx1xD = model.embed(tokens_B[:, None])
        keys, values, inputs = [], [], []
        none = (None,) * config.num_layers
        for layer, key_BxGxMxK, value_BxGxMxK, p_BxE in zip(
            weights["layers"], cache.keys, cache.values, cache.probabilities or none, strict=True
        ):
            block = nnx.merge(block_graph, layer)
            h_Bx1xD = rms_norm(x_Bx1xD, block.attention_norm[...], epsilon)
            query, key, value = (
                x.swapaxes(1, 2)
                for x in block.attention.project(h_Bx1xD, positions_B[:, None], rope)
            )
            keys.append(_write(key_BxGxMxK, key, positions_B))
            values.append(_write(value_BxGxMxK, value, positions_B))
            attended_BxHx1xK = attend(query, keys[-1], values[-1], mask_Bx1x1xM)
            x_Bx1xD += block.attention.combine(attended_BxHx1xK.swapaxes(1, 2))
            h_Bx1xD = rms_norm(x_Bx1xD, block.ffn_norm[...], epsilon)
            x_Bx1xD += _apply(block.ffn, h_Bx1xD, p_BxE)
            inputs.append(h_Bx1xD[:, 0])
        totals = cache.totals
        if totals is not None:
            totals = tuple(
                total_BxD + h_BxD.astype(jnp.float32)
                for total_BxD, h_BxD in zip(totals, inputs, strict=True)
            )
        logits_BxV = model.unembed(model.normalize(x_Bx1xD))[:, 0]
        cache = cache._replace(keys=tuple(keys), values=tuple(values), totals=totals)
        return logits_BxV, cache._replace(positions_B=positions_B + 1, starts_B=starts_B)

    # ------------------------------------------------------------------ a segment border
    def merge_again(params: Params, ffns: Any, cache: Cache) -> tuple[Any, Cache]:
        assert cache.totals is not None
        layer_graph, layers = _split_layers(assemble(graph, params))
        at_border_B = cache.positions_B % T == 0

        def merge_layer(_: None, inputs: tuple[Params, Array]) -> tuple[None, Any]:
            layer, total_BxD = inputs
            ffn = nnx.merge(layer_graph, layer).ffn
            assert isinstance(ffn, MergedFFN)
            r_BxE = keep_top_k(route(total_BxD / T, ffn.router[...]), config.top_k_experts)
            return None, _merge(ffn, r_BxE)

        _, merged = jax.lax.scan(merge_layer, None, (layers, jnp.stack(cache.totals)))
        totals = tuple(jnp.where(at_border_B[:, None], 0.0, total) for total in cache.totals)
        cache = cache._replace(totals=totals)
        if cache.probabilities is not None:
            chosen = tuple(
                jnp.where(at_border_B[:, None], new, old)
                for new, old in zip(_unstack(merged), cache.probabilities, strict=True)
            )
            return ffns, cache._replace(probabilities=chosen)
        fresh = tuple(layer["ffn"] for layer in served(params, merged)["layers"])
        rows = at_border_B if ffns[0]["gate"].ndim == 3 else at_border_B[0]  # all share one FFN
        return jax.tree.map(functools.partial(_choose, rows), fresh, ffns), cache

    # Only the FFNs are donated: some of the other weights are the trained parameters.
    jitted_merge_again = jax.jit(merge_again, donate_argnums=(1, 2))

    def remerge(params: Params, weights: Params, cache: Cache) -> tuple[Params, Cache]:
        ffns = tuple(layer["ffn"] for layer in weights["layers"])
        ffns, cache = jitted_merge_again(params, ffns, cache)
        layers = tuple(
            {**layer, "ffn": ffn} for layer, ffn in zip(weights["layers"], ffns, strict=True)
        )
        return {**weights, "layers": layers}, cache

    return Decoder(
        jax.jit(prefill, static_argnums=(3, 4)), jax.jit(step, donate_argnums=1), remerge
    )


# ---------------------------------------------------------------- merging


def _prompt_ffn(
    ffn: DenseFFN | MergedFFN, h_BxPxD: Array, kind: str, lengths_B: Array, shared: bool
) -> tuple[Array, Any]:
    """The FFN's output for the prompt, and the result of `_merge` for the tokens after it."""
    if isinstance(ffn, DenseFFN) or ffn.config.routes_tokens:
        return _apply(ffn, h_BxPxD, None), None
    routing = Routing(kind, lengths_B)
    if kind == "prompt":
        r_BxE = ffn.routing_weights(h_BxPxD, routing)[:, 0]
        if isinstance(ffn, SparseFFN):
            return _apply(ffn, h_BxPxD, r_BxE), r_BxE
        merged = _merge(ffn, r_BxE[:1] if shared else r_BxE)
        return apply_ffn(h_BxPxD, merged), merged
    y_BxPxD, routed = ffn(h_BxPxD, routing)
    last_B = (lengths_B - 1) // ffn.config.segment_length
    return y_BxPxD, _merge(ffn, routed.weights_BxNxE[jnp.arange(len(lengths_B)), last_B])


def _apply(ffn: DenseFFN | MergedFFN, h_BxLxD: Array, p_BxE: Array | None) -> Array:
    """Applies an FFN, merged or not; `p_BxE` chooses experts for each row, None for each token."""
    if isinstance(ffn, DenseFFN):
        return ffn(h_BxLxD)
    if p_BxE is None:
        return ffn(h_BxLxD, Routing("prompt"))[0]
    assert isinstance(ffn, SparseFFN)
    return ffn.choose(h_BxLxD, p_BxE[:, None])


def _merge(ffn: MergedFFN, r_RxE: Array) -> Any:
    """The merged FFNs of R rows, or, where experts are chosen instead, the probabilities."""
    if isinstance(ffn, SparseFFN):
        return r_RxE
    dtype = ffn.config.compute_dtype
    return merge_experts({name: w.astype(dtype) for name, w in ffn.experts().items()}, r_RxE)


def _running_total(h_BxPxD: Array, lengths_B: Array, segment_length: int) -> Array:
    """Sums the prompt's tokens in its last segment, which may be full: float32 `[B, D]`."""
    position_1xP = jnp.arange(h_BxPxD.shape[1])[None]
    last_Bx1 = (lengths_B[:, None] - 1) // segment_length
    counts_BxP = (position_1xP // segment_length == last_Bx1) & (position_1xP < lengths_B[:, None])
    return jnp.sum(jnp.where(counts_BxP[..., None], h_BxPxD.astype(jnp.float32), 0.0), axis=1)


def _choose(is_new: Array, new: Array, old: Array) -> Array:
    """The new FFNs where `is_new`, which holds a value for each row, or one for all."""
    rows = jnp.expand_dims(is_new, tuple(range(1, old.ndim)) if is_new.ndim else ())
    return jnp.where(rows, new, old)


# ---------------------------------------------------------------- the weights of the dense model


def _served(kept: ModelConfig, mesh: Mesh | None, params: Params, ffn: Params) -> Params:
    """The dense model that decodes: these FFNs in the trained parameters, in the compute type.

    `ffn` holds `[Y, D, F]` matrices or, one for each of R rows, `[Y, R, D, F]`; R = 1 is dropped.
    """
    _, axes = build(kept)
    merged_axes = axes["layers"]["ffn"]
    ffn = {name: ffn[name] for name in merged_axes}
    has_rows = ffn["gate"].ndim > len(merged_axes["gate"])
    if has_rows and ffn["gate"].shape[1] == 1:
        ffn = {name: w[:, 0] for name, w in ffn.items()}
    elif has_rows:
        merged_axes = {name: ("layers", "whole", *rest) for name, (_, *rest) in merged_axes.items()}
    layers = {**params["layers"], "ffn": ffn}
    layer_axes = {**axes["layers"], "ffn": merged_axes}
    found = _in_compute_type(kept, {**params, "layers": layers})
    return {
        **found,
        "layers": tuple(
            jax.tree.map(
                lambda w, names, y=y: _pin(w[y], partition_spec(names[1:]), mesh),
                found["layers"],
                layer_axes,
            )
            for y in range(kept.num_layers)
        ),
    }


def _in_compute_type(config: ModelConfig, params: Params) -> Params:
    """Casts matrices once to the compute type; norms and routers are used in float32."""

    def convert(path: Any, w: Array) -> Array:
        name = path[-1].key
        is_float32 = name.endswith("norm") or name == "router" or name in ADAPTED
        return w if is_float32 else w.astype(config.compute_dtype)

    return jax.tree_util.tree_map_with_path(convert, params)


def _split_layers(model: Transformer) -> tuple[nnx.GraphDef, Any]:
    graph, layers = nnx.split(model.layers)
    return graph, layers


def _unstack(stacked: Array) -> tuple[Array, ...]:
    return tuple(stacked[y] for y in range(stacked.shape[0]))


def _write(cached_BxGxMxK: Array, new_BxGx1xK: Array, positions_B: Array) -> Array:
    rows = jnp.arange(len(positions_B))
    return cached_BxGxMxK.at[rows, :, positions_B].set(new_BxGx1xK[:, :, 0])


def _pin(x: Array, spec: PartitionSpec, mesh: Mesh | None) -> Array:
    return x if mesh is None else jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def _pin_cache(cached: tuple[Array, ...], mesh: Mesh | None) -> tuple[Array, ...]:
    if mesh is None:
        return cached
    devices = mesh.shape["fsdp"] * mesh.shape["tensor"]
    divides = cached[0].shape[1] % devices == 0
    spec = PartitionSpec(None, CACHE_AXES) if divides else PartitionSpec()
    return tuple(_pin(x_BxGxMxK, spec, mesh) for x_BxGxMxK in cached)
