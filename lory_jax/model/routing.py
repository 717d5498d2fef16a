"""Where the routing weights of each segment come from (paper, sections 2.2 and 3.1).

Pure functions on arrays. Everything is computed in float32 and returns `r_BxNxE`, one distribution
over the experts per sequence and segment.

Letters: B batch, L sequence, T tokens per segment, N = ceil(L / T) segments, D model, E experts.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from lory_jax.model.routing_source import num_segments, segment_means, summaries


@dataclass(frozen=True)
class Routing:
    """How a forward pass is routed: as in training, or by prompts (docs/api.md).

    `kind` is "causal", "prefix" or a sparse baseline's (training), "prompt" or "segment"
    (inference, which need `prompt_lengths_B`: tokens of each row that are its prompt). `kept` is
    how many experts a merge keeps (`keep_about`); None keeps `config.model.top_k_experts`.
    `is_straight_through` lets the routers learn as if all were kept. `by_cutoff` lets experts with
    thresholds take their share of the batch instead, in training.
    """

    kind: str
    prompt_lengths_B: Array | None = None
    kept: Array | None = None
    is_straight_through: bool = False
    by_cutoff: Array | bool = False


class Routed(NamedTuple):
    """How a layer (with a leading Y: every layer) was routed.

    weights_BxNxE: routing weights of every segment, float32; where tokens are routed, the mean of
      their probabilities.
    balance: the load-balancing loss, of ReMoE the L1 loss; None for other rules, and except in
      training.
    dropped: the share of tokens or segments that no expert processed; None unless sparse, in
      training.
    load_E: the share of tokens that each expert processes, or is asked to; None unless tokens
      choose or have gates, in training.
    cutoff_E: where expert choice would cut off; None unless experts have thresholds, in training.
    """

    weights_BxNxE: Array
    balance: Array | None = None
    dropped: Array | None = None
    load_E: Array | None = None
    cutoff_E: Array | None = None


def route(mean_xD: Array, router_DxE: Array) -> Array:
    """softmax(R(mean)) over all experts, float32: no top-k, no capacity, no auxiliary loss."""
    logits_xE = jnp.matmul(
        mean_xD.astype(jnp.float32),
        router_DxE.astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )
    return jax.nn.softmax(logits_xE, axis=-1)


def keep_top_k(r_xE: Array, k: int) -> Array:
    """Only the k largest weights of each distribution, renormalised; 0 keeps all.

    Section 6 of the paper names this as a way to a sparse model: a merge then reads k experts. Ties
    go to the lower index, so exactly k are kept.
    """
    num_experts = r_xE.shape[-1]
    if not 0 < k < num_experts:
        return r_xE
    kept_xk, index_xk = jax.lax.top_k(r_xE, k)
    kept_xk = kept_xk / jnp.sum(kept_xk, axis=-1, keepdims=True)
    is_expert_xkE = jax.nn.one_hot(index_xk, num_experts, dtype=bool)
    return jnp.sum(jnp.where(is_expert_xkE, kept_xk[..., None], 0.0), axis=-2)


def keep_about(r_xE: Array, kept: Array, is_straight_through: bool = False) -> Array:
    """`keep_top_k` for a real number of experts, which training lowers step by step.

    Of 2.3 experts, the two of largest weight are kept whole and the third with 0.3 of its weight,
    before all are renormalised. At an integer this is `keep_top_k`.

    Args:
      r_xE: routing weights, float32.
      kept: a scalar of at least 1.
      is_straight_through: whether gradients are those of `r_xE` itself.
    """
    order_xE = jnp.argsort(r_xE, axis=-1, descending=True, stable=True)
    rank_xE = jnp.argsort(order_xE, axis=-1)
    kept_xE = r_xE * jnp.clip(kept - rank_xE, 0.0, 1.0)
    kept_xE = kept_xE / jnp.sum(kept_xE, axis=-1, keepdims=True)
    if not is_straight_through:
        return kept_xE
    return jax.lax.stop_gradient(kept_xE) + (r_xE - jax.lax.stop_gradient(r_xE))


def causal_routing(
    h_BxLxD: Array,
    router_DxE: Array,
    segment_length: int,
    first_segment: str,
    source: str = "last",
) -> Array:
    """Training: segment k > 1 is routed by the mean of segment k-1 (section 3.1).

    With another `source`, by what `routing_source.summaries` makes of the segments before k.
    Segment 1 is routed by its own mean with a stop-gradient on its weights alone
    (`first_segment="self"`, the paper), or gets 1/E for every expert (`"uniform"`).
    """
    r_BxNxE = route(summaries(h_BxLxD, segment_length, source), router_DxE)
    first_Bx1xE = _first_segment(r_BxNxE[:, :1], first_segment)
    return jnp.concatenate([first_Bx1xE, r_BxNxE[:, :-1]], axis=1)


def prefix_routing(
    h_BxLxD: Array, router_DxE: Array, segment_length: int, first_segment: str
) -> Array:
    """The ablation of section 5.1: segment 1 routes the whole sequence.

    Segment 1 itself is treated as in `causal_routing`, so the router still learns from the rest.
    """
    N = num_segments(h_BxLxD.shape[1], segment_length)
    r_Bx1xE = route(segment_means(h_BxLxD[:, :segment_length], segment_length), router_DxE)
    rest_BxNxE = jnp.repeat(r_Bx1xE, N - 1, axis=1)
    return jnp.concatenate([_first_segment(r_Bx1xE, first_segment), rest_BxNxE], axis=1)


def prompt_routing(h_BxLxD: Array, router_DxE: Array, prompt_lengths_B: Array) -> Array:
    """Inference: one decision per row, from the mean over its prompt; returns `[B, 1, E]`.

    A row with an empty prompt gets 1/E for every expert.
    """
    mean_Bx1xD = segment_means(h_BxLxD, h_BxLxD.shape[1], prompt_lengths_B)
    return _uniform_where_empty(route(mean_Bx1xD, router_DxE), prompt_lengths_B)


def segment_routing(
    h_BxLxD: Array,
    router_DxE: Array,
    segment_length: int,
    prompt_lengths_B: Array,
    source: str = "last",
) -> Array:
    """Inference: as in training, but segment 1 is routed by the prompt tokens in it.

    A row with an empty prompt starts with 1/E for every expert.
    """
    r_BxNxE = route(summaries(h_BxLxD, segment_length, source), router_DxE)
    first_Bx1xD = summaries(h_BxLxD[:, :segment_length], segment_length, source, prompt_lengths_B)
    first_Bx1xE = _uniform_where_empty(route(first_Bx1xD, router_DxE), prompt_lengths_B)
    return jnp.concatenate([first_Bx1xE, r_BxNxE[:, :-1]], axis=1)


def _first_segment(r_Bx1xE: Array, first_segment: str) -> Array:
    if first_segment == "uniform":
        return jnp.full_like(r_Bx1xE, 1.0 / r_Bx1xE.shape[-1])
    if first_segment == "self":
        return jax.lax.stop_gradient(r_Bx1xE)
    raise ValueError(f"first_segment: got {first_segment!r}; must be 'self' or 'uniform'")


def _uniform_where_empty(r_Bx1xE: Array, prompt_lengths_B: Array) -> Array:
    is_empty_Bx1x1 = (prompt_lengths_B == 0)[:, None, None]
    return jnp.where(is_empty_Bx1x1, 1.0 / r_Bx1xE.shape[-1], r_Bx1xE)
