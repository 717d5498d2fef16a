"""Attention in plain JAX, for any device and any mask that training and evaluation need.

Letters: B batch, L queries, M keys, H heads of queries, G heads of keys and values, R = H / G,
K head width; l queries of one block.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


class Branches(NamedTuple):
    """Several continuations sharing a prefix, packed in one row.

    Attributes:
      positions_BxL: the position of each token, counted along its own continuation.
      branch_BxL: which continuation a token belongs to, from 1; 0 is the prefix. A continuation
        attends to itself and to the prefix.
    """

    positions_BxL: Array
    branch_BxL: Array


def document_starts(tokens_BxL: Array, bos_id: int, branch_BxL: Array | None = None) -> Array:
    """Where in its row the document of every token begins: int32 `[B, L]`.

    A document begins at a BOS, and the first one of a row at its first token. A token of a branch
    is in the document that its own branch began, or else the prefix.
    """
    at_L = jnp.arange(tokens_BxL.shape[1], dtype=jnp.int32)
    begins_BxL = jnp.where(tokens_BxL == bos_id, at_L[None], 0)
    if branch_BxL is None:
        return jax.lax.cummax(begins_BxL, axis=1)
    its_Bx1xM, mine_BxLx1 = branch_BxL[:, None], branch_BxL[:, :, None]
    is_seen_BxLxM = (at_L[None] <= at_L[:, None])[None]
    is_seen_BxLxM &= (its_Bx1xM == 0) | (its_Bx1xM == mine_BxLx1)
    return jnp.max(jnp.where(is_seen_BxLxM, begins_BxL[:, None], 0), axis=-1)


def attend(query: Array, key: Array, value: Array, mask: Array) -> Array:
    """Softmax attention of `[B, H, L, K]` over `[B, G, M, K]` where `mask` (`[..., L, M]`) is true.

    Scores and softmax are float32.
    """
    weights_BxHxLxM = jax.nn.softmax(_scores(query, key, mask), axis=-1)
    grouped = _by_group(weights_BxHxLxM.astype(value.dtype), value) @ value
    return grouped.reshape(*query.shape[:3], -1)


def _scores(query: Array, key: Array, mask: Array) -> Array:
    """Float32 scores `[B, H, L, M]`, far below all others where the mask is false."""
    query = query * query.shape[-1] ** -0.5
    scores_BxGxRLxM = jnp.matmul(
        _by_group(query, key), key.swapaxes(-1, -2), preferred_element_type=jnp.float32
    )
    scores_BxHxLxM = scores_BxGxRLxM.reshape(*query.shape[:3], -1)
    return jnp.where(mask, scores_BxHxLxM, -1e30)


def _by_group(x_BxHxLxN: Array, key: Array) -> Array:
    """`[B, G, R * L, N]`: the R query heads of a group are R * L rows beside its head of keys."""
    B, _, _, N = x_BxHxLxN.shape
    return x_BxHxLxN.reshape(B, key.shape[1], -1, N)


def blocked_attention(
    query: Array,
    key: Array,
    value: Array,
    branch_BxL: Array | None = None,
    starts_BxL: Array | None = None,
) -> Array:
    """Causal attention of `[B, L, H, K]` over `[B, L, G, K]`, by blocks of queries.

    A block attends to the keys up to its own end, so nearly half of the L x L scores are never
    computed. The backward pass computes the scores again from what is kept, which are the inputs,
    the outputs and the logarithm of every query's normaliser (as in FlashAttention, Dao et al.
    2022, arXiv 2205.14135).
    """
    query, key, value = (x.swapaxes(1, 2) for x in (query, key, value))
    return _causal(query, key, value, branch_BxL, starts_BxL).swapaxes(1, 2)


@jax.custom_vjp
def _causal(
    query: Array, key: Array, value: Array, branch_BxL: Array | None, starts_BxL: Array | None
) -> Array:
    return _forward(query, key, value, branch_BxL, starts_BxL)[0]


def _forward(
    query: Array, key: Array, value: Array, branch_BxL: Array | None, starts_BxL: Array | None
) -> tuple[Array, tuple[Array | None, ...]]:
    outputs, normalisers = [], []
    for start, end in _blocks(query.shape[2]):
        mask = _mask(start, end, branch_BxL, starts_BxL)
        scores_BxHxlxM = _scores(query[:, :, start:end], key[:, :, :end], mask)
        top_BxHxlx1 = jnp.max(scores_BxHxlxM, axis=-1, keepdims=True)
        weights_BxHxlxM = jnp.exp(scores_BxHxlxM - top_BxHxlx1)
        total_BxHxlx1 = jnp.sum(weights_BxHxlxM, axis=-1, keepdims=True)
        weights_BxHxlxM = (weights_BxHxlxM / total_BxHxlx1).astype(value.dtype)
        grouped = _by_group(weights_BxHxlxM, value) @ value[:, :, :end]
        outputs.append(grouped.reshape(*query.shape[:2], end - start, -1))
        normalisers.append(top_BxHxlx1 + jnp.log(total_BxHxlx1))
    output, normaliser = (jnp.concatenate(parts, axis=2) for parts in (outputs, normalisers))
    return output, (query, key, value, output, normaliser, branch_BxL, starts_BxL)


def _backward(saved: tuple[Any, ...], doutput: Array) -> tuple[Array, Array, Array, None, None]:
    query, key, value, output, normaliser_BxHxLx1, branch_BxL, starts_BxL = saved
    exact, scale = jnp.float32, query.shape[-1] ** -0.5
    # What the softmax takes off every gradient of a query's scores.
    common_BxHxLx1 = jnp.sum(doutput.astype(exact) * output, axis=-1, keepdims=True, dtype=exact)
    dqueries = []
    dkey, dvalue = jnp.zeros(key.shape, exact), jnp.zeros(value.shape, exact)
    for start, end in _blocks(query.shape[2]):
        mask = _mask(start, end, branch_BxL, starts_BxL)
        q, dy, normaliser, common = (
            x[:, :, start:end] for x in (query, doutput, normaliser_BxHxLx1, common_BxHxLx1)
        )
        k, v = key[:, :, :end], value[:, :, :end]
        weights_BxHxlxM = jnp.exp(_scores(q, k, mask) - normaliser)
        dweights_BxGxRlxM = jnp.matmul(
            _by_group(dy, value), v.swapaxes(-1, -2), preferred_element_type=exact
        )
        dweights_BxHxlxM = dweights_BxGxRlxM.reshape(weights_BxHxlxM.shape)
        dscores_BxHxlxM = weights_BxHxlxM * (dweights_BxHxlxM - common)
        dscores = _by_group(dscores_BxHxlxM.astype(query.dtype), key)
        weights = _by_group(weights_BxHxlxM.astype(value.dtype), value)
        dqueries.append((dscores @ k).reshape(q.shape) * scale)
        dkey, dvalue = (
            total.at[:, :, :end].add(
                jnp.matmul(x.swapaxes(-1, -2), _by_group(y, key), preferred_element_type=exact)
            )
            for total, x, y in ((dkey, dscores, q * scale), (dvalue, weights, dy))
        )
    dquery = jnp.concatenate(dqueries, axis=2)
    return dquery, dkey.astype(key.dtype), dvalue.astype(value.dtype), None, None


_causal.defvjp(_forward, _backward)


def _blocks(length: int) -> list[tuple[int, int]]:
    """At most eight blocks of queries."""
    size = max(32, -(-length // 8))
    return [(start, min(start + size, length)) for start in range(0, length, size)]


def _mask(start: int, end: int, branch_BxL: Array | None, starts_BxL: Array | None) -> Array:
    """Which keys up to `end` a query of this block attends to: `[l, M]` or `[B, 1, l, M]`."""
    mask = jnp.arange(end)[None] <= jnp.arange(start, end)[:, None]
    if branch_BxL is not None or starts_BxL is not None:
        mask = mask[None, None]
    if branch_BxL is not None:
        mine_Bx1xlx1 = branch_BxL[:, None, start:end, None]
        its_Bx1x1xM = branch_BxL[:, None, None, :end]
        mask = mask & ((its_Bx1x1xM == 0) | (its_Bx1x1xM == mine_Bx1xlx1))
    if starts_BxL is not None:
        mask = mask & (jnp.arange(end)[None, None, None] >= starts_BxL[:, None, start:end, None])
    return mask
