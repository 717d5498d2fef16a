"""The products of the merged FFN in plain JAX: block of F by block of F, or in one block.

A block of merged weights is used at once and discarded. One block is fastest on CPUs, where several
are strided slices; several bound the memory that merged weights take.

Letters: S segments, T tokens per segment, D model, F FFN, E experts, b one block of F.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from lory_jax.model.merged_ffn.reference import merge
from lory_jax.model.merged_ffn.vjp import Combine, Products

MERGED_BYTES = 256 * 2**20  # the part of a merged matrix held at once, per device
CACHED_BYTES = 2**21  # gradients of merged weights processed at a time, on CPUs
BLOCK_MULTIPLE = 128  # lanes of a TPU register

D_AXIS = {"gate": 1, "up": 1, "down": 2}
F_AXIS = {"gate": 2, "up": 2, "down": 1}


def whole_products() -> Products:
    """The products with every matrix merged in one block."""
    return _WHOLE


def block_products() -> Products:
    """The products with blocks of `block_size` columns of F."""
    return _BLOCKS


def block_size(S: int, D: int, F: int, itemsize: int) -> int:
    """Columns of F per block, so that a merged block of all S segments fits `MERGED_BYTES`."""
    columns = MERGED_BYTES // (S * D * itemsize)
    if columns >= F:
        return F
    return max(BLOCK_MULTIPLE, columns // BLOCK_MULTIPLE * BLOCK_MULTIPLE)


def _one_block(S: int, D: int, F: int, itemsize: int) -> int:
    return F


Size = Callable[[int, int, int, int], int]


def _to_hidden(
    size: Size,
    x_SxTxD: Array,
    weights: Mapping[str, Array],
    r_SxE: Array,
    combine: Combine,
    *given: Array,
) -> tuple[Array, ...]:
    products = [_product(size, x_SxTxD, w, r_SxE, name) for name, w in weights.items()]
    outs = combine(*(h_SxTxF.astype(jnp.float32) for h_SxTxF in (*products, *given)))
    return tuple(h_SxTxF.astype(x_SxTxD.dtype) for h_SxTxF in outs)


def _product(size: Size, x_SxTxD: Array, w: Array, r_SxE: Array, name: str) -> Array:
    def put_block(h_SxTxF: Array, start: Array, block: Array) -> Array:
        h_SxTxb = jnp.matmul(x_SxTxD, _merge_DxF(block, r_SxE, name))
        return jax.lax.dynamic_update_slice_in_dim(h_SxTxF, h_SxTxb, start, axis=2)

    F = w.shape[F_AXIS[name]]
    h_SxTxF = jnp.zeros((*x_SxTxD.shape[:2], F), x_SxTxD.dtype)
    return _over_blocks(put_block, h_SxTxF, w, size, x_SxTxD, name)


def _from_hidden(
    size: Size, hidden: Mapping[str, Array], weights: Mapping[str, Array], r_SxE: Array
) -> Array:
    first, *others = hidden
    y_SxTxD = _product_back(size, hidden[first], weights[first], r_SxE, first)
    for name in others:
        y_SxTxD += _product_back(size, hidden[name], weights[name], r_SxE, name)
    return y_SxTxD.astype(hidden[first].dtype)


def _product_back(size: Size, h_SxTxF: Array, w: Array, r_SxE: Array, name: str) -> Array:
    def add_block(y_SxTxD: Array, start: Array, block: Array) -> Array:
        b = block.shape[F_AXIS[name]]
        h_SxTxb = jax.lax.dynamic_slice_in_dim(h_SxTxF, start, b, axis=2)
        merged_SxbxD = _merge_DxF(block, r_SxE, name).mT
        return y_SxTxD + jnp.matmul(h_SxTxb, merged_SxbxD, preferred_element_type=jnp.float32)

    D = w.shape[D_AXIS[name]]
    y_SxTxD = jnp.zeros((*h_SxTxF.shape[:2], D), jnp.float32)
    return _over_blocks(add_block, y_SxTxD, w, size, h_SxTxF, name)


def _gradients(
    size: Size, x_SxTxD: Array, h_SxTxF: Array, w: Array, r_SxE: Array, name: str
) -> tuple[Array, Array]:
    def add_block(sums: tuple[Array, Array], start: Array, block: Array) -> tuple[Array, Array]:
        dw, dr_SxE = sums
        b = block.shape[F_AXIS[name]]
        h_SxTxb = jax.lax.dynamic_slice_in_dim(h_SxTxF, start, b, axis=2)
        left, right = (h_SxTxb, x_SxTxD) if name == "down" else (x_SxTxD, h_SxTxb)
        dm_SxMxN = jnp.matmul(left.mT, right)
        with jax.named_scope("merge"):
            dr_SxE += jax.lax.platform_dependent(
                dm_SxMxN, block, cpu=_inner_products_by_rows, default=_inner_products
            )
            # Both sides are float32, because gradients are summed over segments.
            dw_ExMxN = jnp.einsum("se,smn->emn", r_SxE, dm_SxMxN.astype(jnp.float32))
            dw = jax.lax.dynamic_update_slice_in_dim(dw, dw_ExMxN, start, axis=F_AXIS[name])
        return dw, dr_SxE

    sums = jnp.zeros(w.shape, jnp.float32), jnp.zeros(r_SxE.shape, jnp.float32)
    dw, dr_SxE = _over_blocks(add_block, sums, w, size, x_SxTxD, name)
    return dw.astype(w.dtype), dr_SxE


def _inner_products(dm_SxMxN: Array, w_ExMxN: Array) -> Array:
    """The gradient of the routing weights from that of the merged weights."""
    return jnp.einsum("smn,emn->se", dm_SxMxN, w_ExMxN, preferred_element_type=jnp.float32)


def _inner_products_by_rows(dm_SxMxN: Array, w_ExMxN: Array) -> Array:
    """The same for CPUs, where XLA transposes a copy: a few rows of M at a time stay cached."""
    (S, M, N), E = dm_SxMxN.shape, w_ExMxN.shape[0]
    rows = max(1, min(M, CACHED_BYTES // (S * N * dm_SxMxN.dtype.itemsize)))
    while M % rows:
        rows -= 1

    def add_rows(i: Array, dr_SxE: Array) -> Array:
        dm_SxmN = jax.lax.dynamic_slice_in_dim(dm_SxMxN, i * rows, rows, 1).reshape(S, -1)
        w_ExmN = jax.lax.dynamic_slice_in_dim(w_ExMxN, i * rows, rows, 1).reshape(E, -1)
        return dr_SxE + jnp.matmul(dm_SxmN, w_ExmN.T, preferred_element_type=jnp.float32)

    return jax.lax.fori_loop(0, M // rows, add_rows, jnp.zeros((S, E), jnp.float32))


def _merge_DxF(block: Array, r_SxE: Array, name: str) -> Array:
    """Merged weights `[S, D, b]`, or a view of them as such."""
    with jax.named_scope("merge"):
        merged = merge(block, r_SxE)
        return merged.mT if name == "down" else merged


def _over_blocks(
    add_block: Callable[[Any, Array, Array], Any],
    sums: Any,
    w: Array,
    size: Size,
    like_SxTxN: Array,
    name: str,
) -> Any:
    """Adds up all blocks of F: a loop over the full blocks, and then the rest."""
    axis = F_AXIS[name]
    F, S = w.shape[axis], like_SxTxN.shape[0]
    columns = min(F, size(S, w.shape[D_AXIS[name]], F, like_SxTxN.dtype.itemsize))
    whole, rest = divmod(F, columns)
    if whole == 1 and not rest:
        return add_block(sums, jnp.int32(0), w)

    def step(start: Array, columns: int, sums: Any) -> Any:
        return add_block(sums, start, jax.lax.dynamic_slice_in_dim(w, start, columns, axis))

    sums = jax.lax.fori_loop(0, whole, lambda i, sums: step(i * columns, columns, sums), sums)
    return step(jnp.int32(whole * columns), rest, sums) if rest else sums


def _products(size: Size) -> Products:
    return Products(
        lay_out=lambda w, name: w,
        take_back=lambda w, name, shape: w,
        d_axis=D_AXIS.__getitem__,
        to_hidden=functools.partial(_to_hidden, size),
        from_hidden=functools.partial(_from_hidden, size),
        gradients=functools.partial(_gradients, size),
    )


_WHOLE, _BLOCKS = _products(_one_block), _products(lambda *shape: block_size(*shape))
