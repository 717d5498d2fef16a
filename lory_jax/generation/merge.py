"""Merges a Lory model into one dense model, by the routing weights of a text or a domain.

Letters: L sequence, T segment length, N instances, Y layers, E experts.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from lory_jax.console import progress
from lory_jax.errors import InputError
from lory_jax.model.config import ModelConfig
from lory_jax.model.layer_order import join_stacks
from lory_jax.model.low_rank import merge_low_rank
from lory_jax.model.merged_ffn import merge_experts
from lory_jax.model.routing import Routing, keep_top_k
from lory_jax.model.transformer import Params, assemble, build
from lory_jax.parallel import shardings

BATCH = 8


def text_routing(config: ModelConfig, params: Params, tokens: Sequence[int]) -> np.ndarray:
    """Routing weights `[Y, E]`, float32, with this text as the prompt (BOS included).

    A text of more than `config.sequence_length` tokens is read in pieces of that many, and the
    result is the mean of their weights, weighted by length. `config.top_k_experts` applies to each
    piece and to the mean.
    """
    L = config.sequence_length
    pieces = [tokens[start : start + L] for start in range(0, len(tokens), L)]
    total_YxE = np.zeros((len(config.layer_numbers), config.num_experts))
    for piece in progress(pieces, total=len(pieces), label="routing", unit="pieces"):
        tokens_1xL, length_1 = np.asarray([piece], np.int32), np.asarray([len(piece)], np.int32)
        r_Yx1x1xE = _weights(config, "prompt")(params, tokens_1xL, length_1)
        total_YxE += np.asarray(r_Yx1x1xE, np.float64)[:, 0, 0] * len(piece)
    return _kept(config, total_YxE / len(tokens))


def domain_routing(config: ModelConfig, params: Params, tokens_NxL: np.ndarray) -> np.ndarray:
    """Mean routing weights `[Y, E]`, float32, over the segments k > 1 of a domain's instances.

    Raises:
      InputError: instances have one segment only, so no segment routes another.
    """
    if tokens_NxL.shape[1] <= config.segment_length:
        raise InputError(
            f"domain: its instances of {tokens_NxL.shape[1]} tokens have one segment of "
            f"{config.segment_length}, requires at least two"
        )
    total_YxE = np.zeros((len(config.layer_numbers), config.num_experts))
    starts = range(0, len(tokens_NxL), BATCH)
    for start in progress(starts, total=len(starts), label="routing", unit="batches"):
        r_YxBxNxE = _weights(config, None)(params, tokens_NxL[start : start + BATCH], None)
        total_YxE += np.asarray(r_YxBxNxE, np.float64)[:, :, 1:].mean(axis=2).sum(axis=1)
    return _kept(config, total_YxE / len(tokens_NxL))


def _kept(config: ModelConfig, r_YxE: np.ndarray) -> np.ndarray:
    r_YxE = r_YxE.astype(np.float32)
    return np.asarray(keep_top_k(jnp.asarray(r_YxE), config.top_k_experts))


@functools.lru_cache(maxsize=2)
def _weights(config: ModelConfig, kind: str | None) -> Callable[..., Array]:
    """The jitted `(params, tokens_BxL, prompt_lengths_B) -> r_YxBxNxE`, computed in float32."""
    graph, _ = build(dataclasses.replace(config, compute_dtype="float32"))

    @jax.jit
    def weights(params: Params, tokens_BxL: Array, prompt_lengths_B: Array | None) -> Any:
        routing = None if kind is None else Routing(kind, prompt_lengths_B)
        _, routed = assemble(graph, params).hidden(tokens_BxL, routing)
        assert routed is not None
        return routed.weights_BxNxE

    return weights


def merged_params(config: ModelConfig, params: Params, r_YxE: np.ndarray, mesh: Mesh) -> Params:
    """The float32 parameters of the dense model whose FFNs are the experts merged by `r_YxE`."""
    dense = dataclasses.replace(config, num_experts=0)

    def convert(params: Params, r_YxE: Array) -> Params:
        ffn = params["layers"]["ffn"]

        def merge_layer(ffn: Params, r_E: Array) -> Params:
            merge = merge_low_rank if config.expert_rank else merge_experts
            # The result is kept, so accelerators must not round float32 products.
            with jax.default_matmul_precision("highest"):
                return {name: w[0] for name, w in merge(ffn, r_E[None]).items()}

        experts = {name: w for name, w in ffn.items() if name != "router"}
        merged = jax.vmap(merge_layer)(experts, r_YxE)
        layers = {**params["layers"], "ffn": merged}
        others = {k: v for k, v in params.items() if k != "dense_layers"}
        return {**others, "layers": join_stacks(config, layers, params.get("dense_layers"))}

    pinned = jax.jit(convert, out_shardings=shardings(build(dense)[1], mesh))
    return pinned(params, jnp.asarray(r_YxE))


def join_shared(params: Params) -> Params:
    """The same dense model, with each shared FFN made a part of the one beside it, now 2 F wide."""
    layers = dict(params["layers"])
    ffn, shared = layers["ffn"], layers.pop("shared")
    joined = {
        name: jnp.concatenate([ffn[name], shared[name]], axis=-2 if name == "down" else -1)
        for name in ffn
        if name != "down_bias"
    }
    if "down_bias" in ffn:
        joined["down_bias"] = ffn["down_bias"] + shared["down_bias"]
    return {**params, "layers": {**layers, "ffn": joined}}
