"""The products of the merged FFN in plain JAX: block of F by block of F, or in one block.

A block of merged weights is used at once and dropped. One block is fastest on CPUs, where several
are strided slices; several bound the memory that merged weights take.

Letters: S segments, T tokens per segment, D model, F FFN, E experts, b one block of F.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from lory_jax.model.merged_ffn.reference import merge
from lory_jax.model.merged_ffn.vjp import Products

MERGED_BYTES = 256 * 2**20  # of one merged matrix held at once, per device
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


def _to_hidden(size: Size, x_SxTxD: Array, w: Array, r_SxE: Array, name: str) -> Array:
    def put_block(h_SxTxF: Array, start: Array, block: Array) -> Array:
        h_SxTxb = jnp.matmul(x_SxTxD, _merge_DxF(block, r_SxE, name))
        return jax.lax.dynamic_update_slice_in_dim(h_SxTxF, h_SxTxb, start, axis=2)

    F = w.shape[F_AXIS[name]]
    h_SxTxF = jnp.zeros((*x_SxTxD.shape[:2], F), x_SxTxD.dtype)
    return _over_blocks(put_block, h_SxTxF, w, size, x_SxTxD, name)


def _from_hidden(size: Size, h_SxTxF: Array, w: Array, r_SxE: Array, name: str) -> Array:
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
            dr_SxE += jnp.einsum("smn,emn->se", dm_SxMxN, block, preferred_element_type=jnp.float32)
            # In float32 on both sides: the sum over segments is a gradient's.
            dw_ExMxN = jnp.einsum("se,smn->emn", r_SxE, dm_SxMxN.astype(jnp.float32))
            dw = jax.lax.dynamic_update_slice_in_dim(dw, dw_ExMxN, start, axis=F_AXIS[name])
        return dw, dr_SxE

    sums = jnp.zeros(w.shape, jnp.float32), jnp.zeros(r_SxE.shape, jnp.float32)
    return _over_blocks(add_block, sums, w, size, x_SxTxD, name)


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
    """Adds up all blocks of F: a loop over the whole ones, and what remains."""
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
        take_back=lambda w, name, E: w,
        d_axis=D_AXIS.__getitem__,
        to_hidden=functools.partial(_to_hidden, size),
        from_hidden=functools.partial(_from_hidden, size),
        gradients=functools.partial(_gradients, size),
    )


_WHOLE, _BLOCKS = _products(_one_block), _products(lambda *shape: block_size(*shape))
