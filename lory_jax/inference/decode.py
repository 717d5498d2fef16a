"""How Lory infers: merge the experts into one FFN per row, then decode like any dense model.

A prompt is read in one pass (`prefill`). In every layer it decides the routing weights of its row,
and the experts are merged with them. From there on each row owns a plain FFN per layer, and `step`
is the step of a dense LLaMA with a KV cache. Routing by prompt (paper, section 2.2: inference)
never merges again. Routing by segment (its table 9) does so at every segment border: `remerge`
needs nothing but the hidden states of the segment just finished, which `step` sums up on the way,
so it runs between two steps and leaves the step itself alone.

Of the sparse baselines, a token takes its own experts, so that a layer remembers nothing of its
routing; where segments are routed, what is kept as "merged" is the row's distribution over experts.

Token by token this computes what `Transformer(tokens, Routing(kind, prompt_lengths_B))` computes
for the whole sequence at once.

Letters: B batch, P padded prompt length, M positions in the cache, Y layers, D model, F FFN,
H heads, K head width, V vocabulary, E experts, T tokens per segment.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.typing import ArrayLike

from lory_jax.errors import InputError
from lory_jax.model.attention import attend, causal_attention
from lory_jax.model.merged_ffn import merge_experts, swiglu
from lory_jax.model.routing import route
from lory_jax.model.transformer import (
    DenseFFN,
    MergedFFN,
    ModelConfig,
    Params,
    Routing,
    SparseFFN,
    Transformer,
    build,
    merge_params,
    rms_norm,
)

ROUTINGS = ("prompt", "segment")
SHAPE_MULTIPLE = 64  # prompts and caches are padded to it, so that few shapes are compiled


class LayerCache(NamedTuple):
    """What one layer (or, with a leading Y, all of them) remembers of every row.

    key_BxHxMxK, value_BxHxMxK: of the positions so far, in the compute type.
    merged: the row's own FFN `{"gate": [B, D, F], "up": [B, D, F], "down": [B, F, D]}`; of expert
      choice of segments, `{"probabilities": [B, E]}`; None where each token passes by itself
      (dense, or routed by token).
    total_BxD: float32 sum of the FFN inputs over the running segment; None where segments do not
      route.
    """

    key_BxHxMxK: Array
    value_BxHxMxK: Array
    merged: dict[str, Array] | None
    total_BxD: Array | None


class Cache(NamedTuple):
    """The state of a batch being decoded: `positions_B` is where each row's next token goes."""

    positions_B: Array
    layers: LayerCache


class Decoder(NamedTuple):
    """The three jitted functions; those that take a cache donate it.

    prefill: `(params, tokens_BxP, lengths_B, M)` to the logits after each prompt and the cache.
    remerge: `(params, cache)` to the cache, the FFNs of rows at a segment border merged anew.
    step: `(params, cache, tokens_B)` to the logits after those tokens and the cache.
    """

    prefill: Callable[[Params, ArrayLike, ArrayLike, int], tuple[Array, Cache]]
    remerge: Callable[[Params, Cache], Cache]
    step: Callable[[Params, Cache, Array], tuple[Array, Cache]]


@functools.lru_cache(maxsize=8)
def make_decoder(config: ModelConfig, routing: str) -> Decoder:
    """Returns the functions that decode with a model, routed by "prompt" or by "segment"."""
    if routing not in ROUTINGS:
        raise InputError(f"routing: got {routing!r}, takes {' or '.join(ROUTINGS)}")
    graph, _ = build(config)
    T, epsilon, theta = config.segment_length, config.norm_epsilon, config.rope_theta
    reroutes = _reroutes(config, routing)

    # ------------------------------------------------------------------ the prompt, in one pass
    def prefill(
        params: Params, tokens_BxP: Array, lengths_B: Array, cache_length: int
    ) -> tuple[Array, Cache]:
        model = merge_params(graph, params)
        layer_graph, layers = _split_layers(model)
        B, P = tokens_BxP.shape
        positions_BxP = jnp.broadcast_to(jnp.arange(P), (B, P))

        def to_cache(x_BxPxHxK: Array) -> Array:
            padding = ((0, 0), (0, cache_length - P), (0, 0), (0, 0))
            return jnp.pad(x_BxPxHxK, padding).swapaxes(1, 2)

        def run_layer(x_BxPxD: Array, layer: Params) -> tuple[Array, LayerCache]:
            block = nnx.merge(layer_graph, layer)
            h_BxPxD = rms_norm(x_BxPxD, block.attention_norm[...], epsilon)
            query, key, value = block.attention.project(h_BxPxD, positions_BxP, theta)
            x_BxPxD += block.attention.combine(causal_attention(query, key, value))
            h_BxPxD = rms_norm(x_BxPxD, block.ffn_norm[...], epsilon)
            y_BxPxD, merged = _prompt_ffn(block.ffn, h_BxPxD, routing, lengths_B)
            total_BxD = _running_total(h_BxPxD, lengths_B, T) if reroutes else None
            return x_BxPxD + y_BxPxD, LayerCache(to_cache(key), to_cache(value), merged, total_BxD)

        x_BxPxD, cached = jax.lax.scan(run_layer, model.embed(tokens_BxP), layers)
        last_Bx1xD = x_BxPxD[jnp.arange(B), lengths_B - 1][:, None]
        return model.unembed(model.normalize(last_Bx1xD))[:, 0], Cache(lengths_B, cached)

    # ------------------------------------------------------------------ a segment border
    def remerge(params: Params, cache: Cache) -> Cache:
        layer_graph, layers = _split_layers(merge_params(graph, params))
        at_border_B = cache.positions_B % T == 0

        def run_layer(_: None, inputs: tuple[Params, Any]) -> tuple[None, Any]:
            layer, (merged, total_BxD) = inputs
            ffn = nnx.merge(layer_graph, layer).ffn
            assert isinstance(ffn, MergedFFN)
            fresh = _merge(ffn, route(total_BxD / T, ffn.router[...]))
            return None, jax.tree.map(
                functools.partial(_choose_rows, at_border_B),
                (fresh, jnp.zeros_like(total_BxD)),
                (merged, total_BxD),
            )

        kept = (cache.layers.merged, cache.layers.total_BxD)
        _, (merged, total) = jax.lax.scan(run_layer, None, (layers, kept))
        return cache._replace(layers=cache.layers._replace(merged=merged, total_BxD=total))

    # ------------------------------------------------------------------ one token of every row
    def step(params: Params, cache: Cache, tokens_B: Array) -> tuple[Array, Cache]:
        model = merge_params(graph, params)
        layer_graph, layers = _split_layers(model)
        positions_B = cache.positions_B
        M = cache.layers.key_BxHxMxK.shape[-2]
        mask_Bx1x1xM = (jnp.arange(M) <= positions_B[:, None])[:, None, None]

        def run_layer(x_Bx1xD: Array, inputs: tuple[Params, LayerCache]) -> tuple[Array, Any]:
            layer, cached = inputs
            block = nnx.merge(layer_graph, layer)
            h_Bx1xD = rms_norm(x_Bx1xD, block.attention_norm[...], epsilon)
            query, key, value = (
                x_Bx1xHxK.swapaxes(1, 2)
                for x_Bx1xHxK in block.attention.project(h_Bx1xD, positions_B[:, None], theta)
            )
            attended_BxHx1xK = attend(
                query,
                _write(cached.key_BxHxMxK, key, positions_B),
                _write(cached.value_BxHxMxK, value, positions_B),
                mask_Bx1x1xM,
            )
            x_Bx1xD += block.attention.combine(attended_BxHx1xK.swapaxes(1, 2))
            h_Bx1xD = rms_norm(x_Bx1xD, block.ffn_norm[...], epsilon)
            if cached.merged is None:
                y_Bx1xD = _apply_to_tokens(block.ffn, h_Bx1xD)
            else:
                y_Bx1xD = _apply(block.ffn, cached.merged, h_Bx1xD)
            return x_Bx1xD + y_Bx1xD, (key, value, h_Bx1xD[:, 0])

        x_Bx1xD, (key, value, h_YxBxD) = jax.lax.scan(
            run_layer, model.embed(tokens_B[:, None]), (layers, cache.layers)
        )
        # Written once for all layers, outside the scan: into the donated buffers, without a copy.
        write = jax.vmap(_write, in_axes=(0, 0, None))
        cached = cache.layers._replace(
            key_BxHxMxK=write(cache.layers.key_BxHxMxK, key, positions_B),
            value_BxHxMxK=write(cache.layers.value_BxHxMxK, value, positions_B),
        )
        if cached.total_BxD is not None:
            cached = cached._replace(total_BxD=cached.total_BxD + h_YxBxD.astype(jnp.float32))
        return model.unembed(model.normalize(x_Bx1xD))[:, 0], Cache(positions_B + 1, cached)

    return Decoder(
        jax.jit(prefill, static_argnums=3),
        jax.jit(remerge, donate_argnums=1),
        jax.jit(step, donate_argnums=1),
    )


def decode(
    config: ModelConfig,
    params: Params,
    prompts: Sequence[Sequence[int]],
    choose: Callable[[Array, np.ndarray], Array],
    *,
    max_new_tokens: int,
    routing: str = "prompt",
) -> Iterator[np.ndarray]:
    """Continues a batch of prompts, one token of every row at a time.

    Args:
      config, params: the model.
      prompts: token ids of each row, BOS included; at least one, of any lengths.
      choose: `(logits_BxV, positions_B) -> tokens_B`, where positions are those of the new tokens.
      max_new_tokens: how many tokens to yield per row; stop iterating to stop earlier.
      routing: "prompt" or "segment"; a dense model ignores it.

    Yields:
      int32 `[B]`, the next token of every row.

    Raises:
      InputError: no prompt, an empty one, or more positions than the model was trained on.
    """
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise InputError("prompts: takes at least one, each of at least one token (its BOS)")
    lengths_B = np.array([len(prompt) for prompt in prompts], np.int32)
    longest, limit = int(lengths_B.max()), config.sequence_length
    if max_new_tokens < 1 or longest + max_new_tokens > limit:
        raise InputError(
            f"max_new_tokens: got {max_new_tokens} after a prompt of {longest} tokens (BOS "
            f"included), takes 1 to {limit - longest}: the model reads up to {limit} positions"
            if longest < limit
            else f"prompt: got {longest} tokens (BOS included), takes at most {limit - 1}: the "
            f"model reads up to {limit} positions"
        )
    tokens_BxP = np.zeros((len(prompts), _padded(longest, limit)), np.int32)
    for row, prompt in enumerate(prompts):
        tokens_BxP[row, : len(prompt)] = prompt

    decoder = make_decoder(config, routing)
    cache_length = _padded(longest + max_new_tokens, limit)
    logits_BxV, cache = decoder.prefill(params, tokens_BxP, lengths_B, cache_length)
    tokens_B = choose(logits_BxV, lengths_B)
    yield np.asarray(tokens_B)
    for count in range(1, max_new_tokens):
        positions_B = lengths_B + count - 1  # of tokens_B, which the step reads
        if _reroutes(config, routing) and (positions_B % config.segment_length == 0).any():
            cache = decoder.remerge(params, cache)
        logits_BxV, cache = decoder.step(params, cache, tokens_B)
        tokens_B = choose(logits_BxV, positions_B + 1)
        yield np.asarray(tokens_B)


def _reroutes(config: ModelConfig, routing: str) -> bool:
    return routing == "segment" and config.num_experts > 0 and not config.routes_tokens


def _choose_rows(is_new_B: Array, new: Array, old: Array) -> Array:
    return jnp.where(jnp.expand_dims(is_new_B, tuple(range(1, old.ndim))), new, old)


def _prompt_ffn(
    ffn: DenseFFN | MergedFFN, h_BxPxD: Array, kind: str, lengths_B: Array
) -> tuple[Array, dict[str, Array] | None]:
    """The FFN's output for the prompt, and each row's merged FFN for the token that follows it."""
    if isinstance(ffn, DenseFFN) or ffn.config.routes_tokens:
        return _apply_to_tokens(ffn, h_BxPxD), None
    routing = Routing(kind, lengths_B)
    if kind == "prompt":
        merged = _merge(ffn, ffn.routing_weights(h_BxPxD, routing)[:, 0])
        return _apply(ffn, merged, h_BxPxD), merged
    y_BxPxD, routed = ffn(h_BxPxD, routing)
    last_B = (lengths_B - 1) // ffn.config.segment_length
    return y_BxPxD, _merge(ffn, routed.weights_BxNxE[jnp.arange(len(lengths_B)), last_B])


def _apply_to_tokens(ffn: DenseFFN | MergedFFN, h_BxLxD: Array) -> Array:
    """An FFN that needs to know nothing but the token."""
    return ffn(h_BxLxD) if isinstance(ffn, DenseFFN) else ffn(h_BxLxD, Routing("prompt"))[0]


def _split_layers(model: Transformer) -> tuple[nnx.GraphDef, Any]:
    graph, layers = nnx.split(model.layers)
    return graph, layers


def _merge(ffn: MergedFFN, r_BxE: Array) -> dict[str, Array]:
    if isinstance(ffn, SparseFFN):
        return {"probabilities": r_BxE}
    dtype = ffn.config.compute_dtype
    return merge_experts({name: w.astype(dtype) for name, w in ffn.experts().items()}, r_BxE)


def _apply(ffn: DenseFFN | MergedFFN, merged: Any, h_BxLxD: Array) -> Array:
    if isinstance(ffn, SparseFFN):
        return ffn.choose(h_BxLxD, merged["probabilities"][:, None])
    return swiglu(h_BxLxD, merged["gate"], merged["up"], merged["down"])


def _running_total(h_BxPxD: Array, lengths_B: Array, segment_length: int) -> Array:
    """Sum over the prompt's tokens in its last segment, which may be full: float32 `[B, D]`."""
    position_P = jnp.arange(h_BxPxD.shape[1])
    last_Bx1 = (lengths_B[:, None] - 1) // segment_length
    counts_BxP = (position_P // segment_length == last_Bx1) & (position_P < lengths_B[:, None])
    return jnp.sum(jnp.where(counts_BxP[..., None], h_BxPxD.astype(jnp.float32), 0.0), axis=1)


def _write(cached_BxHxMxK: Array, new_BxHx1xK: Array, positions_B: Array) -> Array:
    rows = jnp.arange(len(positions_B))
    return cached_BxHxMxK.at[rows, :, positions_B].set(new_BxHx1xK[:, :, 0])


def _padded(length: int, limit: int) -> int:
    return min(-(-length // SHAPE_MULTIPLE) * SHAPE_MULTIPLE, limit)
