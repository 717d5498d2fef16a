"""The merged FFN's Pallas kernels for TPUs: merged weights never leave the chip.

A matrix unit is efficient only if the contracted dimension fills it, but merging contracts over
experts, of which there are few. Plain merging also returns rows of D in turn, each for all
segments, whereas the product that follows needs segment after segment. One block-diagonal matrix
solves both problems: with P rows of D at a time, and experts laid out with D outermost,

    A[(s, p), (q, e)] = r[s, e] where p = q, else 0          [S * P, P * E]
    A @ w[(q, e), F] = merged[(s, p), F]

which is an ordinary product with P * E contracted, and whose result is ordered segment by segment
in whole tiles of P rows. Its transpose takes gradients of merged weights dM back to experts, A^T @
dM, and the gradient of r[s, e] is the sum of (dM @ w^T)[(s, p), (p, e)] over p.

Letters: S segments, G of them at a time, T tokens per segment, D model, F FFN, b columns of F at a
time, E experts, P rows of D in one product.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lory_jax.model.merged_ffn.tiling import ROWS, SUBLANES, Tiling


@dataclass(frozen=True)
class Unroll:
    """Loop steps per iteration, so that products overlap with reading earlier results."""

    rows: int = 16  # of tiles of D
    segments: int = 4


def spread(r_SxE: Array, tiling: Tiling, dtype: Any) -> Array:
    """The block-diagonal A: `[S * P, P * E]`, its rows in the order of `_split_rows`."""
    P, G = tiling.rows, tiling.group
    S, E = r_SxE.shape
    eye_PxP = jnp.eye(P, dtype=r_SxE.dtype)
    a_SxPxPE = jnp.einsum("se,pq->spqe", r_SxE, eye_PxP).reshape(S, P, P * E)
    if P < SUBLANES:
        a_SxPxPE = a_SxPxPE.reshape(S // G, 2, G // 2, P, P * E).swapaxes(1, 2)
    return a_SxPxPE.reshape(S * P, P * E).astype(dtype)


def gather_spread(da_SPxPE: Array, tiling: Tiling) -> Array:
    """The gradient `[S, E]` of the routing weights from that of `spread`'s matrix."""
    P, G = tiling.rows, tiling.group
    SP, PE = da_SPxPE.shape
    if P < SUBLANES:
        da_SPxPE = da_SPxPE.reshape(SP // (G * P), G // 2, 2, P, PE).swapaxes(1, 2)
    return jnp.einsum("sppe->se", da_SPxPE.reshape(SP // P, P, P, PE // P))


def _join_rows(parts: list[Array], G: int, P: int) -> Array:
    """`[G, 8, b]` of products `[G * P, b]` of the 8 / P parts of 8 rows of D, in float32.

    With P = 8 each register already holds 8 rows of one segment. With P = 4 it holds 4 rows of
    segment j and the same 4 of segment j + G/2: halves of registers are swapped.
    """
    if P == SUBLANES:
        return parts[0].reshape(G, P, -1)
    first, second = (part.reshape(G // 2, SUBLANES, -1) for part in parts)
    is_top = jax.lax.broadcasted_iota(jnp.int32, first.shape, 1) < P
    top = jnp.where(is_top, first, _swap_halves(second))
    bottom = jnp.where(is_top, _swap_halves(first), second)
    return jnp.concatenate([top, bottom], axis=0)


def _split_rows(m_Gx8xb: Array, P: int) -> list[Array]:
    """The inverse of `_join_rows`."""
    G = m_Gx8xb.shape[0]
    if P == SUBLANES:
        return [m_Gx8xb.reshape(G * P, -1)]
    top, bottom = m_Gx8xb[: G // 2], m_Gx8xb[G // 2 :]
    is_top = jax.lax.broadcasted_iota(jnp.int32, top.shape, 1) < P
    first = jnp.where(is_top, top, _swap_halves(bottom))
    second = jnp.where(is_top, _swap_halves(top), bottom)
    return [part.reshape(G * P, -1) for part in (first, second)]


def _swap_halves(x_Gx8xb: Array) -> Array:
    return pltpu.roll(x_Gx8xb, SUBLANES // 2, 1)


def _dot(a: Array, b: Array, contract: tuple[int, int] = (1, 0)) -> Array:
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a,
        b,
        (((contract[0],), (contract[1],)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )


def _rows_of(start: Any, P: int, per_row: int) -> Any:
    """The slice of experts' rows that belongs to P rows of D from `start` on."""
    return pl.ds(pl.multiple_of(start * per_row, P * per_row), P * per_row)


def _merge(a_ref: Any, w_ref: Any, m_ref: Any, P: int, unroll: int, first: Any = 0) -> None:
    """Merges experts' rows of D for a group of segments, into `m_ref` `[G, D, b]` from a row on."""
    G = m_ref.shape[0]
    E = a_ref.shape[1] // P
    rows = w_ref.shape[0] // E

    def step(i: Array, _: None) -> None:
        tiles = []
        for tile in range(ROWS // SUBLANES):
            starts = [i * ROWS + tile * SUBLANES + p for p in range(0, SUBLANES, P)]
            parts = [_dot(a_ref[...], w_ref[_rows_of(d, P, E), :]) for d in starts]
            tiles.append(_join_rows(parts, G, P))
        m_Gx16xb = jnp.concatenate(tiles, axis=1).astype(m_ref.dtype)
        m_ref[:, pl.ds(pl.multiple_of(first + i * ROWS, ROWS), ROWS), :] = m_Gx16xb

    jax.lax.fori_loop(0, rows // ROWS, step, None, unroll=unroll)


def _add(is_first: Any, sums: Array, value: Array) -> Array:
    """Adds one more term to the sum; the first replaces what memory happens to hold."""
    return jnp.where(is_first, 0.0, sums) + value


def _split(refs: list[Any], first: int, second: int) -> tuple[list[Any], list[Any], list[Any]]:
    return refs[:first], refs[first : first + second], refs[first + second :]


def to_hidden_kernel(
    a_ref: Any,
    x_ref: Any,
    *refs: Any,
    P: int,
    unroll: Unroll,
    weights: int,
    given: int,
    combine: Callable[..., tuple[Array, ...]],
) -> None:
    """Products of x with matrices, passed with the `given` activations through `combine`.

    The grid: groups of segments, blocks of F, matrices, parts of D. Experts arrive part by part;
    the product waits for the whole of D, so that no sum over parts has to be kept. `refs`: the
    matrices, what is given, what comes out, and as scratch the products with all matrices but the
    last, if there are several, and a block of one merged matrix.
    """
    *blocks, m_ref = refs
    w_refs, given_refs, rest = _split(blocks, weights, given)
    *out_refs, products_ref = rest if weights > 1 else [*rest, None]
    G, D, _ = m_ref.shape
    rows = w_refs[0].shape[0] * P // a_ref.shape[1]  # of D in a part
    part = pl.program_id(3)

    def product(g: Array, k: int) -> None:
        h_Txb = _dot(x_ref[g], m_ref[g])
        if k < weights - 1:
            products_ref[k, g] = h_Txb
            return
        products = [*(products_ref[i, g] for i in range(k)), h_Txb]
        outs = combine(*products, *(ref[g].astype(jnp.float32) for ref in given_refs))
        for ref, value in zip(out_refs, outs, strict=True):
            ref[g] = value.astype(ref.dtype)

    for k, w_ref in enumerate(w_refs):

        @pl.when(pl.program_id(2) == k)
        def _(k: int = k, w_ref: Any = w_ref) -> None:
            _merge(a_ref, w_ref, m_ref, P, unroll.rows, pl.multiple_of(part * rows, ROWS))

            @pl.when(part == D // rows - 1)
            def _() -> None:
                jax.lax.fori_loop(0, G, lambda g, _: product(g, k), None, unroll=unroll.segments)


def from_hidden_kernel(a_ref: Any, *refs: Any, P: int, unroll: Unroll, weights: int) -> None:
    """The sum of the products of activations, each with its matrix, over blocks of F.

    The grid: groups of segments, parts of D, blocks of F. `refs`: the activations, the matrices,
    what comes out, and as scratch a block of every merged matrix and the sums over blocks.
    """
    *blocks, y_ref, m_ref, sums_ref = refs
    h_refs, w_refs, _ = _split(blocks, weights, weights)
    is_first = pl.program_id(2) == 0

    def step(g: Array, _: None) -> None:
        terms = [_dot(h_ref[g], m_ref[k, g], (1, 1)) for k, h_ref in enumerate(h_refs)]
        y_Txd = _add(is_first, sums_ref[g], functools.reduce(jnp.add, terms))
        sums_ref[g] = y_Txd
        y_ref[g] = y_Txd.astype(y_ref.dtype)

    for k, w_ref in enumerate(w_refs):
        _merge(a_ref, w_ref, m_ref.at[k], P, unroll.rows)
    jax.lax.fori_loop(0, y_ref.shape[0], step, None, unroll=unroll.segments)


def gradients_kernel(
    at_ref: Any,
    xt_ref: Any,
    h_ref: Any,
    w_ref: Any,
    dw_ref: Any,
    dr_ref: Any,
    dm_ref: Any,
    sums_ref: Any,
    *,
    P: int,
    unroll: Unroll,
) -> None:
    """The gradients of one matrix's experts, summed over segments, and of the routing weights.

    The grid: parts of D, blocks of F, groups of segments. `xt_ref` holds the group's segments or
    all of them. Scratch: the gradients of a block of merged weights, and the sums over groups.
    """
    G, D, _ = dm_ref.shape
    E = w_ref.shape[0] // D
    group = pl.program_id(2)
    is_first = group == 0
    first = 0 if xt_ref.shape[0] == G else group * G

    def product(g: Array, _: None) -> None:
        dm_ref[g] = _dot(xt_ref[first + g], h_ref[g])

    jax.lax.fori_loop(0, G, product, None, unroll=unroll.segments)

    def take_apart(i: Array, dr: Array) -> Array:
        start = pl.multiple_of(i * SUBLANES, SUBLANES)
        parts = _split_rows(dm_ref[:, pl.ds(start, SUBLANES), :], P)
        for k, part in enumerate(parts):
            here = _rows_of(start + k * P, P, E)
            part = part.astype(w_ref.dtype)
            dw = _add(is_first, sums_ref[here, :], _dot(at_ref[0], part))
            sums_ref[here, :] = dw
            dw_ref[here, :] = dw.astype(dw_ref.dtype)
            dr += _dot(part, w_ref[here, :], (1, 1))
        return dr

    zero = jnp.zeros((G * P, P * E), jnp.float32)
    dr_ref[0, 0, 0] = jax.lax.fori_loop(0, D // SUBLANES, take_apart, zero, unroll=unroll.rows)
