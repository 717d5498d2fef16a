"""The compiled programs of decoding: read prompts, take one step, route again, change rows.

`prefill` reads the prompts in one pass. In every layer it computes the routing weights, and merges
the experts by them unless they stay unmerged (`ffn.py` has the arithmetic, `cost.py` the choice).
`step` is then a dense LLaMA's with a KV cache, the same program whether an FFN was merged or
trained; rows with different prompts have an FFN each, and rows that share the routing share one.
With unmerged experts, each row keeps its routing weights instead, and one FFN serves all rows.

Routing by prompt (paper, section 2.2: inference) routes only once. Routing by segment (its table 9)
routes again at every segment border: `reroute` only requires the hidden states of the segment that
has just ended, whose sums `step` keeps.

Layers are unrolled in `step` (weights.py says why). On a mesh, weights keep their sharding from
training (embed on `fsdp`, mlp on `tensor`) and activations are moved between devices, so any batch
size works.

Letters: B batch, P padded prompt length, M positions in the cache, Y layers, D model, F FFN,
H heads, G heads of keys and values, K head width, V vocabulary, E experts, T tokens per segment,
R FFNs that rows own or share.

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
from jax.sharding import Mesh, PartitionSpec
from jax.typing import ArrayLike

from lory_jax.generation.ffn import EXPERTS, MERGED, Sharing, next_ffn, prompt_ffn, step_ffn
from lory_jax.generation.settings import check_routing
from lory_jax.generation.weights import ffns_of, pin, pin_merged, served_weights, with_ffns
from lory_jax.model.attention import attend, blocked_attention, document_starts
from lory_jax.model.config import ModelConfig
from lory_jax.model.ffn import MergedFFN
from lory_jax.model.layer_order import in_order, run_layers
from lory_jax.model.routing import keep_top_k, route
from lory_jax.model.routing_source import Running, add_token, after_prompt, at_border
from lory_jax.model.transformer import Params, Transformer, assemble, build, rms_norm

CACHE_AXES = ("fsdp", "tensor")  # mesh axes that shard the heads of keys, if they divide


class Cache(NamedTuple):
    """The state of a batch being decoded; one array per layer in each tuple.

    positions_B: the position of each row's next token.
    starts_B: the position at which each row's document begins; None without a document mask.
    keys, values: `[B, G, M, K]` of the positions so far, in the compute type.
    routing: of every layer with experts, float32 `[B, E]`: the weights of rows whose experts are
      not merged or, in the baseline whose segments choose experts, the router's probabilities in
      the current segment; otherwise None.
    segments: of every layer with experts, sums of the FFN inputs over the current segment; None
      where segments do not route.
    sharing: which rows share a merged FFN; None if all do, or none do.
    """

    positions_B: Array
    starts_B: Array | None
    keys: tuple[Array, ...]
    values: tuple[Array, ...]
    routing: tuple[Array, ...] | None
    segments: tuple[Running, ...] | None
    sharing: Sharing | None = None


class Decoder(NamedTuple):
    """The programs; those that read a cache donate it.

    prefill: `(params, tokens_BxP, lengths_B, M, given_YxE)` to the logits after each prompt, their
      merged FFNs (`[Y, B, ...]`, None where nothing is merged) and the cache. `given_YxE` are
      routing weights that replace those of the prompts, or None; it requires routing by prompt.
    weights: `(params, merged)` to the weights that `step` reads.
    step: `(weights, cache, tokens_B)` to the logits after those tokens and the cache.
    reroute: `(params, weights, cache)` to the weights and the cache, with rows at a segment border
      routed anew.
    place: `(weights, logits_BxV, cache, row, logits_1xV, merged, cache of one row)` to the batch's
      weights, logits and cache with that row in place of its own.
    """

    prefill: Callable[
        [Params, ArrayLike, ArrayLike, int, ArrayLike | None], tuple[Array, Params, Cache]
    ]
    weights: Callable[[Params, Params | None], Params]
    step: Callable[[Params, Cache, Array], tuple[Array, Cache]]
    reroute: Callable[[Params, Params, Cache], tuple[Params, Cache]]
    place: Callable[..., tuple[Params, Array, Cache]]


@functools.lru_cache(maxsize=8)
def make_decoder(
    config: ModelConfig, routing: str, mesh: Mesh | None = None, ffn: str = MERGED
) -> Decoder:
    """The programs that decode with a model, routed by "prompt" or by "segment".

    `mesh` is the one the parameters are on; None is a single device. `ffn` says whether experts are
    "merged" for each row or stay "experts"; it makes no difference to a dense or sparse model.
    """
    check_routing(routing)
    graph, _ = build(config)
    is_lory = config.num_experts > 0 and not config.is_sparse
    is_merged = is_lory and ffn != EXPERTS
    served = config
    if is_merged:
        served = dataclasses.replace(config, num_experts=0, top_k_experts=0)
    T, epsilon, rope = config.segment_length, config.norm_epsilon, config.rope
    source = config.routing_source
    has_segments = config.num_experts > 0 and not config.routes_tokens
    reroutes = routing == "segment" and has_segments and config.routing != "uniform"

    # ------------------------------------------------------------------ the prompt, in one pass
    def prefill(
        params: Params,
        tokens_BxP: Array,
        lengths_B: Array,
        cache_length: int,
        given_YxE: Array | None = None,
    ) -> tuple[Array, Any, Cache]:
        model = assemble(graph, params)
        (layer_graph, layers), (dense_graph, dense_layers) = model.stacks()
        B, P = tokens_BxP.shape
        positions_BxP = jnp.broadcast_to(jnp.arange(P), (B, P))
        starts_BxP = document_starts(tokens_BxP, config.bos_id) if config.document_mask else None

        def to_cache(x_BxPxGxK: Array) -> Array:
            padding = ((0, 0), (0, cache_length - P), (0, 0), (0, 0))
            return jnp.pad(x_BxPxGxK, padding).swapaxes(1, 2)

        def run_layer(
            x_BxPxD: Array, inputs: tuple[Params, Array | None], is_dense: bool
        ) -> tuple[Array, Any]:
            layer, given_E = inputs
            block = nnx.merge(dense_graph if is_dense else layer_graph, layer)
            h_BxPxD = rms_norm(x_BxPxD, block.attention_norm[...], epsilon)
            query, key, value = block.attention.project(h_BxPxD, positions_BxP, rope)
            heads_BxPxHxK = blocked_attention(query, key, value, starts_BxL=starts_BxP)
            x_BxPxD += block.attention.combine(heads_BxPxHxK)
            h_BxPxD = rms_norm(x_BxPxD, block.ffn_norm[...], epsilon)
            y_BxPxD, routed = prompt_ffn(block.ffn, h_BxPxD, routing, lengths_B, is_merged, given_E)
            segment = None
            if reroutes and not is_dense:
                segment = after_prompt(h_BxPxD, lengths_B, T, source)
            x_BxPxD += block.with_others(y_BxPxD, h_BxPxD)
            return x_BxPxD, ((to_cache(key), to_cache(value)), routed, segment)

        x_BxPxD, (of_layers, routed, segments), of_dense = run_layers(
            dataclasses.replace(config, scan_layers=True),
            run_layer,
            model.embed(tokens_BxP),
            (layers, given_YxE),
            None if dense_layers is None else (dense_layers, None),
        )
        keys_and_values = in_order(
            config, _unstack(of_layers), () if of_dense is None else _unstack(of_dense[0])
        )
        keys, values = zip(*keys_and_values, strict=True)
        last_Bx1xD = x_BxPxD[jnp.arange(B), lengths_B - 1][:, None]
        cache = Cache(
            lengths_B,
            None if starts_BxP is None else starts_BxP[jnp.arange(B), lengths_B - 1],
            _pin_cache(keys, mesh),
            _pin_cache(values, mesh),
            None if routed is None or is_merged else _unstack(routed),
            None if segments is None else _unstack(segments),
        )
        logits_BxV = model.unembed(model.normalize(last_Bx1xD))[:, 0]
        return logits_BxV, pin_merged(routed, mesh) if is_merged else None, cache

    def weights_of(params: Params, merged: Params | None) -> Params:
        ffn = params["layers"]["ffn"] if merged is None else merged
        return served_weights(config, served, mesh, params, ffn)

    # ------------------------------------------------------------------ one token of every row
    served_graph, _ = build(served)
    stack = nnx.eval_shape(lambda: Transformer(served, jax.random.key(0)))
    (block_graph, _), (dense_block_graph, _) = stack.stacks()

    def step(weights: Params, cache: Cache, tokens_B: Array) -> tuple[Array, Cache]:
        # The stacked layers are not used here, so any single layer can take their place.
        some = {"layers": weights["layers"][served.layer_numbers[0]]}
        if served.dense_layer_numbers:
            some["dense_layers"] = weights["layers"][served.dense_layer_numbers[0]]
        model = assemble(served_graph, {**weights, **some})
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
        routing = dict(zip(config.layer_numbers, cache.routing or (), strict=bool(cache.routing)))
        for y, (layer, key_BxGxMxK, value_BxGxMxK) in enumerate(
            zip(weights["layers"], cache.keys, cache.values, strict=True)
        ):
            is_dense = y in served.dense_layer_numbers
            block = nnx.merge(dense_block_graph if is_dense else block_graph, layer)
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
            y_Bx1xD = step_ffn(block.ffn, h_Bx1xD, routing.get(y), cache.sharing)
            x_Bx1xD += block.with_others(y_Bx1xD, h_Bx1xD)
            if y in config.layer_numbers:
                inputs.append(h_Bx1xD[:, 0])
        segments = cache.segments
        if segments is not None:
            is_first_B = positions_B % T == 0
            segments = tuple(
                add_token(segment, h_BxD, is_first_B)
                for segment, h_BxD in zip(segments, inputs, strict=True)
            )
        logits_BxV = model.unembed(model.normalize(x_Bx1xD))[:, 0]
        cache = cache._replace(keys=tuple(keys), values=tuple(values), segments=segments)
        return logits_BxV, cache._replace(positions_B=positions_B + 1, starts_B=starts_B)

    # ------------------------------------------------------------------ a segment border
    def route_again(params: Params, ffns: Any, cache: Cache) -> tuple[Any, Cache]:
        assert cache.segments is not None
        (layer_graph, layers), _ = assemble(graph, params).stacks()
        at_border_B = cache.positions_B % T == 0

        def route_layer(_: None, inputs: tuple[Params, Running]) -> tuple[None, Any]:
            layer, segment = inputs
            ffn = nnx.merge(layer_graph, layer).ffn
            assert isinstance(ffn, MergedFFN)
            summary_BxD, begun = at_border(segment, cache.positions_B, T, source)
            r_BxE = keep_top_k(route(summary_BxD, ffn.router[...]), config.top_k_experts)
            return None, (next_ffn(ffn, r_BxE, is_merged), begun)

        stacked = jax.tree.map(lambda *parts: jnp.stack(parts), *cache.segments)
        _, (routed, begun) = jax.lax.scan(route_layer, None, (layers, stacked))
        cache = cache._replace(segments=_unstack(begun))
        if is_merged:
            has_rows = ffns[0]["gate"].ndim == 3  # or all share one FFN, and so their borders
            choose = functools.partial(_choose, at_border_B if has_rows else at_border_B[0])
            return jax.tree.map(choose, ffns_of(config, weights_of(params, routed)), ffns), cache
        assert cache.routing is not None
        routed_again = tuple(
            jnp.where(at_border_B[:, None], new_BxE, old_BxE)
            for new_BxE, old_BxE in zip(_unstack(routed), cache.routing, strict=True)
        )
        return ffns, cache._replace(routing=routed_again)

    # Only the FFNs are donated: some of the other weights are the trained parameters, and so are
    # FFNs that no merge has made.
    donated = (1, 2) if is_merged else 2
    jitted_route_again = jax.jit(route_again, donate_argnums=donated)

    def reroute(params: Params, weights: Params, cache: Cache) -> tuple[Params, Cache]:
        ffns = ffns_of(config, weights) if is_merged else None
        ffns, cache = jitted_route_again(params, ffns, cache)
        return with_ffns(config, weights, ffns) if is_merged else weights, cache

    # ------------------------------------------------------------------ another row
    def place_row(
        ffns: Any,
        logits_BxV: Array,
        cache: Cache,
        row: Array,
        logits: Array,
        merged: Any,
        of: Cache,
    ) -> tuple[Any, Array, Cache]:
        def put(batch: Array, one: Array) -> Array:
            return batch.at[row].set(one[0].astype(batch.dtype))

        if is_merged:
            own = _unstack(merged)
            # The only row of a batch owns its FFN, which then has no axis of rows.
            ffns = jax.tree.map(lambda w, o: put(w, o) if w.ndim == o.ndim else o[0], ffns, own)
        return ffns, put(logits_BxV, logits), jax.tree.map(put, cache, of)

    jitted_place_row = jax.jit(place_row, donate_argnums=(0, 1, 2) if is_merged else (1, 2))

    def place(weights: Params, *arguments: Any) -> tuple[Params, Array, Cache]:
        ffns = ffns_of(config, weights) if is_merged else None
        ffns, logits_BxV, cache = jitted_place_row(ffns, *arguments)
        weights = with_ffns(config, weights, ffns) if is_merged else weights
        return weights, logits_BxV, cache

    return Decoder(
        jax.jit(prefill, static_argnums=3),
        jax.jit(weights_of),
        jax.jit(step, donate_argnums=1),
        reroute,
        place,
    )


@functools.partial(jax.jit, static_argnames="spread_ffns")
def spread(
    owner_B: Array, logits_RxV: Array, merged: Params | None, cache: Cache, spread_ffns: bool
) -> tuple[Array, Params | None, Cache]:
    """The state of B rows from that of R different prompts; `owner_B` says which prompt is whose.

    `spread_ffns` gives every row its own FFN, which rows whose segments route them need.
    """
    logits_BxV, cache = jax.tree.map(lambda x: x[owner_B], (logits_RxV, cache))
    if spread_ffns:
        merged = jax.tree.map(lambda w_YxRx: w_YxRx[:, owner_B], merged)
    return logits_BxV, merged, cache


# ---------------------------------------------------------------- small parts


def _choose(is_new: Array, new: Array, old: Array) -> Array:
    """The new FFNs where `is_new`, which holds a value for each row, or one for all."""
    rows = jnp.expand_dims(is_new, tuple(range(1, old.ndim)) if is_new.ndim else ())
    return jnp.where(rows, new, old)


def _unstack(stacked: Any) -> tuple[Any, ...]:
    """The parts of every layer, of arrays that all have the layers' axis first."""
    num_layers = len(jax.tree.leaves(stacked)[0])
    return tuple(jax.tree.map(lambda x, y=y: x[y], stacked) for y in range(num_layers))


def _write(cached_BxGxMxK: Array, new_BxGx1xK: Array, positions_B: Array) -> Array:
    rows = jnp.arange(len(positions_B))
    return cached_BxGxMxK.at[rows, :, positions_B].set(new_BxGx1xK[:, :, 0])


def _pin_cache(cached: tuple[Array, ...], mesh: Mesh | None) -> tuple[Array, ...]:
    if mesh is None:
        return cached
    devices = mesh.shape["fsdp"] * mesh.shape["tensor"]
    divides = cached[0].shape[1] % devices == 0
    spec = PartitionSpec(None, CACHE_AXES) if divides else PartitionSpec()
    return tuple(pin(x_BxGxMxK, spec, mesh) for x_BxGxMxK in cached)
