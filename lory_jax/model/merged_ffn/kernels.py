"""The merged FFN's Pallas kernels for TPUs: merged weights never leave the chip.

A matrix unit wants its contracted dimension full, and merging contracts over experts, of which
there are few; and it gives what it merged row of D by row of D for all segments, where the product
that follows needs segment by segment. Both are mended by one block-diagonal matrix: with P rows of
D at a time, and experts laid out with D outermost,

    A[(s, p), (q, e)] = r[s, e] where p = q, else 0          [S * P, P * E]
    A @ w[(q, e), F] = merged[(s, p), F]

which is an ordinary product with P * E contracted, and whose result lies segment by segment in
whole tiles of P rows. Its transpose takes gradients of merged weights dM back to experts, A^T @ dM,
and the gradient of r[s, e] is the sum of (dM @ w^T)[(s, p), (p, e)] over p.

Letters: S segments, G of them at a time, T tokens per segment, D model, F FFN, b columns of F at a
time, E experts, P rows of D in one product.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

SUBLANES, LANES = 8, 128  # of a register of 32 bits
ROWS = 2 * SUBLANES  # of D in a tile of bfloat16
UNROLL = 4  # steps of a loop, so that one's products run while the other's results are taken

MIB = 2**20
MATRIX_ROWS = 128  # of the matrix unit, which P * E should fill and not exceed
MAX_GROUP = 32

TO_HIDDEN, FROM_HIDDEN, GRADIENTS = "merged_to_hidden", "merged_from_hidden", "merged_gradients"


@dataclass(frozen=True)
class Tiling:
    """How the kernels cut their work; sizes are padded to multiples of these.

    Attributes:
      group: segments at a time, G.
      rows: of D in one product, P: 8 or 4.
      experts: E is padded to a multiple of it, so that P * E is whole tiles.
      columns: of F at a time, b.
      tokens: T is padded to a multiple of it.
    """

    group: int
    rows: int
    experts: int
    columns: int = LANES
    tokens: int = ROWS


def smallest_tiling(E: int, columns: int = LANES) -> Tiling:
    """As few segments as whole tiles of `spread`'s matrix allow."""
    P = SUBLANES if SUBLANES * E <= MATRIX_ROWS else SUBLANES // 2
    return Tiling(group=ROWS // P, rows=P, experts=ROWS // P, columns=columns)


def vmem_capacity() -> int:
    """On-chip memory of the TPU that a program is traced for; without a TPU, a v5e's."""
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else mesh.abstract_device
    is_tpu = device.platform == "tpu" if device else jax.default_backend() == "tpu"
    return pltpu.get_tpu_info().vmem_capacity_bytes if is_tpu else 128 * MIB


def vmem_budget(capacity: int) -> int:
    """What blocks may take."""
    return min(capacity * 7 // 8, 96 * MIB)


def vmem_limit(capacity: int) -> int:
    """What the compiler may take, with what it adds to the blocks."""
    return min(capacity - 2 * MIB, 112 * MIB)


def tile(kernel: str, S: int, T: int, D: int, F: int, E: int, itemsize: int, budget: int) -> Tiling:
    """The tiling of a kernel for one device's segments: the largest group within the budget.

    There are two groups at least, for chips whose two cores share them, and padding adds no more
    than a quarter to S. The gradients read x once per block of F, so their blocks are twice as wide
    if that costs no more than half of the group.
    """

    def largest_group(tiling: Tiling) -> Tiling:
        while tiling.group < MAX_GROUP:
            larger = dataclasses.replace(tiling, group=2 * tiling.group)
            is_too_large = vmem_bytes(kernel, larger, T, D, E, itemsize) > budget
            if is_too_large or 2 * larger.group > S or -S % larger.group > S / 4:
                break
            tiling = larger
        return tiling

    narrow = largest_group(smallest_tiling(E))
    wide = largest_group(smallest_tiling(E, 2 * LANES))
    fits = vmem_bytes(kernel, wide, T, D, E, itemsize) <= budget
    is_even = -(-F // LANES) % 2 == 0
    if kernel == GRADIENTS and fits and is_even and 2 * wide.group >= narrow.group:
        return wide
    return narrow


def vmem_bytes(kernel: str, tiling: Tiling, T: int, D: int, E: int, itemsize: int) -> int:
    """What a kernel's blocks take; those in transit count twice."""
    G, b = tiling.group, tiling.columns
    activations, hidden, merged = G * T * D, G * T * b, G * D * b
    experts, spread = D * E * b, G * tiling.rows * max(LANES, tiling.rows * E)
    shared = 2 * itemsize * (hidden + experts + spread)
    if kernel == TO_HIDDEN:
        return shared + itemsize * (2 * activations + merged)
    if kernel == FROM_HIDDEN:
        return shared + 2 * 4 * activations + itemsize * merged
    return shared + 2 * itemsize * activations + 4 * (2 * experts + 2 * spread + merged)


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

    With P = 8 a register holds 8 rows of one segment as it comes. With P = 4 it holds 4 rows of
    segment j and the same 4 of segment j + G/2: halves of registers change places.
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


def _merge(a_ref: Any, w_ref: Any, m_ref: Any, P: int) -> None:
    """Merges a block of columns for a group of segments into `m_ref` `[G, D, b]`."""
    G, D, _ = m_ref.shape
    E = w_ref.shape[0] // D

    def step(i: Array, _: None) -> None:
        tiles = []
        for tile in range(ROWS // SUBLANES):
            starts = [i * ROWS + tile * SUBLANES + p for p in range(0, SUBLANES, P)]
            parts = [_dot(a_ref[...], w_ref[_rows_of(d, P, E), :]) for d in starts]
            tiles.append(_join_rows(parts, G, P))
        m_Gx16xb = jnp.concatenate(tiles, axis=1).astype(m_ref.dtype)
        m_ref[:, pl.ds(pl.multiple_of(i * ROWS, ROWS), ROWS), :] = m_Gx16xb

    jax.lax.fori_loop(0, D // ROWS, step, None, unroll=UNROLL)


def to_hidden_kernel(a_ref: Any, x_ref: Any, w_ref: Any, h_ref: Any, m_ref: Any, *, P: int) -> None:
    _merge(a_ref, w_ref, m_ref, P)

    def step(g: Array, _: None) -> None:
        h_ref[g] = _dot(x_ref[g], m_ref[g]).astype(h_ref.dtype)

    jax.lax.fori_loop(0, x_ref.shape[0], step, None)


def from_hidden_kernel(
    a_ref: Any, h_ref: Any, w_ref: Any, y_ref: Any, m_ref: Any, *, P: int
) -> None:
    _merge(a_ref, w_ref, m_ref, P)
    is_first = pl.program_id(1) == 0

    def step(g: Array, _: None) -> None:
        y_TxD = _dot(h_ref[g], m_ref[g], (1, 1))
        y_ref[g] = jnp.where(is_first, 0.0, y_ref[g]) + y_TxD

    jax.lax.fori_loop(0, h_ref.shape[0], step, None)


def gradients_kernel(
    at_ref: Any,
    xt_ref: Any,
    h_ref: Any,
    w_ref: Any,
    dw_ref: Any,
    dr_ref: Any,
    dm_ref: Any,
    *,
    P: int,
) -> None:
    G, D, _ = dm_ref.shape
    E = w_ref.shape[0] // D
    is_first = pl.program_id(1) == 0

    def product(g: Array, _: None) -> None:
        dm_ref[g] = _dot(xt_ref[g], h_ref[g])

    jax.lax.fori_loop(0, G, product, None)

    def take_apart(i: Array, dr: Array) -> Array:
        start = pl.multiple_of(i * SUBLANES, SUBLANES)
        parts = _split_rows(dm_ref[:, pl.ds(start, SUBLANES), :], P)
        for k, part in enumerate(parts):
            here = _rows_of(start + k * P, P, E)
            part = part.astype(w_ref.dtype)
            dw = _dot(at_ref[0], part)
            dw_ref[here, :] = jnp.where(is_first, 0.0, dw_ref[here, :]) + dw
            dr += _dot(part, w_ref[here, :], (1, 1))
        return dr

    zero = jnp.zeros((G * P, P * E), jnp.float32)
    dr_ref[0, 0] = jax.lax.fori_loop(0, D // SUBLANES, take_apart, zero, unroll=UNROLL)
