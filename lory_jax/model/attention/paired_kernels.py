"""The Pallas kernels of attention for heads of 64: two side by side in the 128 lanes of a TPU.

A register of a TPU has 128 lanes, and an array whose last axis is 64 is padded to it, in memory and
on the chip. Here q, k and v stay `[L, 128]` per pair of heads, as the projections leave them: there
is nothing to pad and nothing to transpose. The matrix unit contracts all 128 lanes for either head,
with the other head's lanes zeroed in one operand (`_own`); it would not be faster with 64.

Both kernels take blocks of b queries and b keys in the order of `schedule`, which leaves out the
blocks that the causal mask empties. Those on the diagonal go by strips of queries, each with the
keys up to its own end, so that little of their masked half is computed. Rotation happens as blocks
arrive. Softmax is computed in powers of two, whose exponent is the unit's own.

Letters: L sequence, b queries or keys of a block.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lory_jax.model.attention.choice import LANES

K = 64  # width of a head

STRIP = 256  # queries of a block on the diagonal that are processed at a time
SUBLANES = 8
MASKED = -1e30
LOG_2 = math.log(2.0)

ROWS_BY_COLUMNS = (1, 0)  # which axes of the two operands are contracted
BY_LANES = (1, 1)
BY_ROWS = (0, 0)


def schedule(blocks: int, by_keys: bool) -> np.ndarray:
    """The blocks of queries and keys `[2, steps]` that are not masked as a whole.

    By queries, the keys of each one after another, or by keys, the queries of each.
    """
    pairs = [(i, j) for i in range(blocks) for j in range(i + 1)]
    if by_keys:
        pairs.sort(key=lambda pair: (pair[1], pair[0]))
    return np.array(pairs, np.int32).T


def forward_kernel(
    i_ref: Any,
    j_ref: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    cos_ref: Any,
    sin_ref: Any,
    o_ref: Any,
    lse_ref: Any,
    q_own_ref: Any,
    k_rotated_ref: Any,
    max_ref: Any,
    sums_ref: Any,
    *,
    scale: float,
) -> None:
    """Attention of a block of queries, over the steps of its keys; `lse` is in powers of two.

    q, o and `lse` come block by block, k, v and the tables whole. Scratch: the block's queries for
    either head, all keys that were rotated so far, and the running maxima and sums. In the lanes of
    the other head, the sums are those of the weights themselves, because v is one there.
    """
    step = pl.program_id(2)
    i, j = i_ref[step], j_ref[step]
    b = q_ref.shape[0]
    rows, columns = pl.ds(i * b, b), pl.ds(j * b, b)

    @pl.when(j == 0)
    def _begin() -> None:
        q = _rotate(q_ref[...], cos_ref[rows, :], sin_ref[rows, :]) * scale
        for head in range(2):
            q_own_ref[head] = _own(q, head).astype(q_ref.dtype)
        max_ref[...] = jnp.full_like(max_ref, MASKED)
        sums_ref[...] = jnp.zeros_like(sums_ref)

    def attend(first: int, size: int, keys: int, is_masked: bool) -> None:
        queries, here = pl.ds(first, size), pl.ds(j * b, keys)
        k, v = k_rotated_ref[here, :], v_ref[here, :]
        for head in range(2):
            scores = _dot(q_own_ref[head, queries, :], k, BY_LANES)
            if is_masked:
                scores = jnp.where(_is_seen(scores.shape, 0, first), scores, MASKED)
            before = max_ref[head, queries, :]
            maximum = jnp.maximum(before, jnp.max(scores, axis=1, keepdims=True))
            weights = jnp.exp2(scores - jnp.tile(maximum, (1, keys // LANES)))
            max_ref[head, queries, :] = maximum
            terms = _dot(weights.astype(v.dtype), _own(v, head, 1.0), ROWS_BY_COLUMNS)
            sums = sums_ref[head, queries, :] * jnp.exp2(before - maximum)
            sums_ref[head, queries, :] = sums + terms

    @pl.when(i > j)
    def _below_the_diagonal() -> None:
        attend(0, b, b, is_masked=False)

    @pl.when(i == j)
    def _on_the_diagonal() -> None:
        # These queries are the first to see this block of keys, and it is the last they see.
        k = _rotate(k_ref[columns, :], cos_ref[columns, :], sin_ref[columns, :])
        k_rotated_ref[columns, :] = k.astype(k_ref.dtype)
        size = min(b, STRIP)
        for first in range(0, b, size):
            attend(first, size, first + size, is_masked=True)
        is_first_head = _lane((b, LANES)) < K
        sums = jnp.where(is_first_head, sums_ref[0], sums_ref[1])
        of_weights = jnp.where(
            is_first_head, pltpu.roll(sums_ref[0], K, 1), pltpu.roll(sums_ref[1], K, 1)
        )
        o_ref[...] = (sums / of_weights).astype(o_ref.dtype)
        lse = jnp.where(is_first_head, max_ref[0], max_ref[1]) + jnp.log2(of_weights)
        lse_ref[...] = jnp.concatenate([lse.T[0:1], lse.T[K : K + 1]], axis=0)


def backward_kernel(
    i_ref: Any,
    j_ref: Any,
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    cos_ref: Any,
    sin_ref: Any,
    o_ref: Any,
    lse_ref: Any,
    do_ref: Any,
    dq_ref: Any,
    dk_ref: Any,
    dv_ref: Any,
    q_rotated_ref: Any,
    k_own_ref: Any,
    dot_ref: Any,
    dq_sums_ref: Any,
    dk_sums_ref: Any,
    dv_sums_ref: Any,
    *,
    scale: float,
) -> None:
    """The gradients of a block of keys and values, over the steps of its queries.

    k, v, dk and dv come block by block, all else whole. The gradients of all queries of the pair
    are summed on the chip and leave it once. Scores and weights are transposed, `[keys, queries]`,
    so that what belongs to a query is a row. Scratch: the rotated queries, the block's keys for
    either head, the products do * o summed over each head, and the sums of the three gradients.
    """
    step = pl.program_id(2)
    i, j = i_ref[step], j_ref[step]
    b = k_ref.shape[0]
    rows, columns = pl.ds(i * b, b), pl.ds(j * b, b)
    dtype = k_ref.dtype

    @pl.when(j == 0)
    def _first_block_of_keys() -> None:  # which all queries see
        q = _rotate(q_ref[rows, :], cos_ref[rows, :], sin_ref[rows, :]) * scale
        q_rotated_ref[rows, :] = q.astype(dtype)
        dq_sums_ref[rows, :] = jnp.zeros((b, LANES), jnp.float32)
        products = do_ref[rows, :].astype(jnp.float32) * o_ref[rows, :].astype(jnp.float32)
        head = jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), 0)
        is_own = (head == 0) == (_lane((SUBLANES, LANES)) < K)
        dot_ref[:, rows] = _dot(is_own.astype(jnp.float32), products, BY_LANES)

    @pl.when(i == j)
    def _begin() -> None:
        k = _rotate(k_ref[...], cos_ref[columns, :], sin_ref[columns, :]).astype(dtype)
        for head in range(2):
            k_own_ref[head] = _own(k, head)
        dk_sums_ref[...] = jnp.zeros_like(dk_sums_ref)
        dv_sums_ref[...] = jnp.zeros_like(dv_sums_ref)

    def attend(first: int, size: int, keys: int, is_masked: bool) -> None:
        here, seen = pl.ds(i * b + first, size), pl.ds(0, keys)
        q, do, v = q_rotated_ref[here, :], do_ref[here, :], v_ref[seen, :]
        dq, dk, dv = dq_sums_ref[here, :], dk_sums_ref[seen, :], dv_sums_ref[seen, :]
        for head in range(2):
            k, do_own = k_own_ref[head, seen, :], _own(do, head)
            scores = _dot(k, q, BY_LANES)
            if is_masked:
                scores = jnp.where(_is_seen(scores.shape, 1, first), scores, MASKED)
            weights = jnp.exp2(scores - lse_ref[head : head + 1, here])
            dv += _dot(weights.astype(dtype), do_own, ROWS_BY_COLUMNS)
            dweights = _dot(v, do_own, BY_LANES)
            dscores = (weights * (dweights - dot_ref[head : head + 1, here])).astype(dtype)
            dk += _dot(dscores, _own(q, head), ROWS_BY_COLUMNS)
            dq += _dot(dscores, k, BY_ROWS)
        dq_sums_ref[here, :] = dq
        dk_sums_ref[seen, :], dv_sums_ref[seen, :] = dk, dv

    @pl.when(i > j)
    def _below_the_diagonal() -> None:
        attend(0, b, b, is_masked=False)

    @pl.when(i == j)
    def _on_the_diagonal() -> None:
        size = min(b, STRIP)
        for first in range(0, b, size):
            attend(first, size, first + size, is_masked=True)
        # No later keys are seen by these queries. Scores are in powers of two: LOG_2 undoes it.
        dq = dq_sums_ref[rows, :] * (LOG_2 * scale)
        dq = _rotate_back(dq, cos_ref[rows, :], sin_ref[rows, :])
        dq_ref[rows, :] = dq.astype(dtype)

    @pl.when(i == q_ref.shape[0] // b - 1)
    def _end() -> None:
        dk = dk_sums_ref[...] * LOG_2  # the queries were scaled already
        dk = _rotate_back(dk, cos_ref[columns, :], sin_ref[columns, :])
        dk_ref[...] = dk.astype(dtype)
        dv_ref[...] = dv_sums_ref[...].astype(dtype)


def _rotate(x: Array, cos: Array, sin: Array) -> Array:
    x = x.astype(jnp.float32)
    return x * cos + _swap_halves(x) * sin


def _rotate_back(x: Array, cos: Array, sin: Array) -> Array:
    """The transpose of `_rotate`: by the negative angle."""
    return x * cos - _swap_halves(x) * sin


def _swap_halves(x: Array) -> Array:
    """Swaps the halves of either head."""
    is_first_half = _lane(x.shape) & (K // 2) == 0
    return jnp.where(is_first_half, pltpu.roll(x, LANES - K // 2, 1), pltpu.roll(x, K // 2, 1))


def _own(x: Array, head: int, other: float = 0.0) -> Array:
    """x in the lanes of a head, and a constant in the other's."""
    is_own = (_lane(x.shape) < K) == (head == 0)
    return jnp.where(is_own, x, jnp.asarray(other, x.dtype))


def _is_seen(shape: tuple[int, ...], query_axis: int, first: int) -> Array:
    """The causal mask of a strip, whose first query is the `first` of a block on the diagonal."""
    query = first + jax.lax.broadcasted_iota(jnp.int32, shape, query_axis)
    return query >= jax.lax.broadcasted_iota(jnp.int32, shape, 1 - query_axis)


def _lane(shape: tuple[int, ...]) -> Array:
    return jax.lax.broadcasted_iota(jnp.int32, shape, 1)


def _dot(a: Array, b: Array, contract: tuple[int, int]) -> Array:
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a,
        b,
        (((contract[0],), (contract[1],)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )
