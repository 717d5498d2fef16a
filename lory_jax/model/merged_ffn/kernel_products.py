"""The merged FFN's products by the kernels: padding, blocks, and what a call costs.

Letters: S segments, G of them at a time, T tokens per segment, D model, F FFN, b columns of F at a
time, E experts, P rows of D in one product.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lory_jax.model.merged_ffn.kernels import (
    FROM_HIDDEN,
    GRADIENTS,
    MATRIX_ROWS,
    ROWS,
    TO_HIDDEN,
    Tiling,
    from_hidden_kernel,
    gather_spread,
    gradients_kernel,
    spread,
    tile,
    to_hidden_kernel,
    vmem_budget,
    vmem_capacity,
    vmem_limit,
)
from lory_jax.model.merged_ffn.vjp import Products


def kernel_products(interpret: bool = False) -> Products:
    """The products as kernels for a TPU; `interpret` runs them, slowly, anywhere."""
    return _INTERPRETED if interpret else _COMPILED


@dataclass(frozen=True)
class _Call:
    """One call's padded arguments, and its blocks by (group of segments, block of F)."""

    tiling: Tiling
    r_SxE: Array
    w_DExF: Array
    S: int
    T: int
    D: int
    E: int
    F: int
    interpret: bool

    @property
    def groups(self) -> int:
        return self.S // self.tiling.group

    @property
    def blocks(self) -> int:
        return self.F // self.tiling.columns

    def run(
        self,
        kernel: Any,
        grid: tuple[int, int],
        in_specs: list[Any],
        out_specs: Any,
        out_shape: Any,
        scratch: Any,
        name: str,
        *arguments: Array,
    ) -> Any:
        rows = self.tiling.rows
        return pl.pallas_call(
            functools.partial(kernel, P=rows),
            grid=grid,
            in_specs=in_specs,
            out_specs=out_specs,
            out_shape=out_shape,
            scratch_shapes=[scratch],
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "arbitrary"),
                vmem_limit_bytes=vmem_limit(vmem_capacity()),
            ),
            cost_estimate=self.cost(name),
            name=name,
            interpret=self.interpret,
        )(*arguments)

    def cost(self, name: str) -> pl.CostEstimate:
        """The work of the matrix unit, and what the blocks make the DMA move."""
        P = self.tiling.rows
        product = 2 * self.S * self.T * self.D * self.F
        # Each row of A, or of dM, goes through the matrix unit once per 128 contracted.
        filled = math.ceil(P * self.E / MATRIX_ROWS) * MATRIX_ROWS
        merging = 2 * self.S * self.D * self.F * filled * (2 if name == GRADIENTS else 1)
        size = self.w_DExF.dtype.itemsize
        activations, hidden = self.S * self.T * self.D, self.S * self.T * self.F
        experts = self.w_DExF.size
        moved = {
            TO_HIDDEN: size * (activations + hidden + self.groups * experts),
            FROM_HIDDEN: size * (hidden + self.groups * experts) + 4 * activations,
            GRADIENTS: size * (self.blocks * activations + hidden + experts)
            + 4 * (experts + self.blocks * self.S * P * P * self.E),
        }
        return pl.CostEstimate(
            flops=product + merging, transcendentals=0, bytes_accessed=moved[name]
        )


def _prepare(kernel: str, w_DExF: Array, r_SxE: Array, T: int, interpret: bool) -> _Call:
    S, E = r_SxE.shape
    D = w_DExF.shape[0] // E
    budget = vmem_budget(vmem_capacity())
    tiling = tile(kernel, S, T, D, w_DExF.shape[1], E, w_DExF.dtype.itemsize, budget)
    r_SxE = pad(r_SxE, (tiling.group, tiling.experts))
    if D % ROWS or E % tiling.experts:
        w_DxExF = pad(w_DExF.reshape(D, E, -1), (ROWS, tiling.experts, 1))
        D, E, _ = w_DxExF.shape
        w_DExF = w_DxExF.reshape(D * E, -1)
    w_DExF = pad(w_DExF, (1, tiling.columns))
    T += -T % tiling.tokens
    return _Call(tiling, r_SxE, w_DExF, r_SxE.shape[0], T, D, E, w_DExF.shape[1], interpret)


def pad(x: Array, multiples: tuple[int, ...]) -> Array:
    """Zeros at the end of every axis, up to these multiples; x itself if there are none to add."""
    widths = [(0, -size % multiple) for size, multiple in zip(x.shape, multiples, strict=True)]
    return jnp.pad(x, widths) if any(width for _, width in widths) else x


def _to_hidden(x_SxTxD: Array, w_DExF: Array, r_SxE: Array, name: str, *, interpret: bool) -> Array:
    (S, T, _), F = x_SxTxD.shape, w_DExF.shape[1]
    call = _prepare(TO_HIDDEN, w_DExF, r_SxE, T, interpret)
    G, P, b = call.tiling.group, call.tiling.rows, call.tiling.columns
    x_SxTxD = pad(x_SxTxD, (G, call.tiling.tokens, ROWS))
    h_SxTxF = call.run(
        to_hidden_kernel,
        (call.groups, call.blocks),
        [
            pl.BlockSpec((G * P, P * call.E), lambda g, f: (g, 0)),
            pl.BlockSpec((G, call.T, call.D), lambda g, f: (g, 0, 0)),
            pl.BlockSpec((call.D * call.E, b), lambda g, f: (0, f)),
        ],
        pl.BlockSpec((G, call.T, b), lambda g, f: (g, 0, f)),
        jax.ShapeDtypeStruct((call.S, call.T, call.F), x_SxTxD.dtype),
        pltpu.VMEM((G, call.D, b), x_SxTxD.dtype),
        TO_HIDDEN,
        spread(call.r_SxE, call.tiling, x_SxTxD.dtype),
        x_SxTxD,
        call.w_DExF,
    )
    return h_SxTxF[:S, :T, :F]


def _from_hidden(
    h_SxTxF: Array, w_DExF: Array, r_SxE: Array, name: str, *, interpret: bool
) -> Array:
    (S, T, _), D = h_SxTxF.shape, w_DExF.shape[0] // r_SxE.shape[1]
    call = _prepare(FROM_HIDDEN, w_DExF, r_SxE, T, interpret)
    G, P, b = call.tiling.group, call.tiling.rows, call.tiling.columns
    h_SxTxF = pad(h_SxTxF, (G, call.tiling.tokens, b))
    y_SxTxD = call.run(
        from_hidden_kernel,
        (call.groups, call.blocks),
        [
            pl.BlockSpec((G * P, P * call.E), lambda g, f: (g, 0)),
            pl.BlockSpec((G, call.T, b), lambda g, f: (g, 0, f)),
            pl.BlockSpec((call.D * call.E, b), lambda g, f: (0, f)),
        ],
        pl.BlockSpec((G, call.T, call.D), lambda g, f: (g, 0, 0)),
        jax.ShapeDtypeStruct((call.S, call.T, call.D), jnp.float32),
        pltpu.VMEM((G, call.D, b), h_SxTxF.dtype),
        FROM_HIDDEN,
        spread(call.r_SxE, call.tiling, h_SxTxF.dtype),
        h_SxTxF,
        call.w_DExF,
    )
    return y_SxTxD[:S, :T, :D]


def _gradients(
    x_SxTxD: Array, h_SxTxF: Array, w_DExF: Array, r_SxE: Array, name: str, *, interpret: bool
) -> tuple[Array, Array]:
    (S, T, D), E, F = x_SxTxD.shape, r_SxE.shape[1], w_DExF.shape[1]
    call = _prepare(GRADIENTS, w_DExF, r_SxE, T, interpret)
    G, P, b = call.tiling.group, call.tiling.rows, call.tiling.columns
    xt_SxDxT = pad(x_SxTxD, (G, call.tiling.tokens, ROWS)).mT
    h_SxTxF = pad(h_SxTxF, (G, call.tiling.tokens, b))
    a_SPxPE = spread(call.r_SxE, call.tiling, x_SxTxD.dtype)
    at_NxPExGP = a_SPxPE.reshape(call.groups, G * P, P * call.E).mT
    dw_DExF, dr = call.run(
        gradients_kernel,
        (call.blocks, call.groups),
        [
            pl.BlockSpec((1, P * call.E, G * P), lambda f, g: (g, 0, 0)),
            pl.BlockSpec((G, call.D, call.T), lambda f, g: (g, 0, 0)),
            pl.BlockSpec((G, call.T, b), lambda f, g: (g, 0, f)),
            pl.BlockSpec((call.D * call.E, b), lambda f, g: (0, f)),
        ],
        [
            pl.BlockSpec((call.D * call.E, b), lambda f, g: (0, f)),
            pl.BlockSpec((1, 1, G * P, P * call.E), lambda f, g: (f, g, 0, 0)),
        ],
        [
            jax.ShapeDtypeStruct((call.D * call.E, call.F), jnp.float32),
            jax.ShapeDtypeStruct((call.blocks, call.groups, G * P, P * call.E), jnp.float32),
        ],
        pltpu.VMEM((G, call.D, b), jnp.float32),
        GRADIENTS,
        at_NxPExGP,
        xt_SxDxT,
        h_SxTxF,
        call.w_DExF,
    )
    dr_SxE = gather_spread(jnp.sum(dr, axis=0).reshape(call.S * P, P * call.E), call.tiling)
    if (call.D, call.E) != (D, E):
        dw_DExF = dw_DExF.reshape(call.D, call.E, call.F)[:D, :E].reshape(D * E, call.F)
    return dw_DExF[:, :F], dr_SxE[:S, :E]


def _lay_out(w: Array, name: str) -> Array:
    """`[D * E, F]`, D outermost."""
    w_DxExF = w.transpose((2, 0, 1) if name == "down" else (1, 0, 2))
    return w_DxExF.reshape(-1, w_DxExF.shape[2])


def _take_back(w_DExF: Array, name: str, E: int) -> Array:
    w_DxExF = w_DExF.reshape(-1, E, w_DExF.shape[1])
    return w_DxExF.transpose((1, 2, 0) if name == "down" else (1, 0, 2))


def _products(interpret: bool) -> Products:
    return Products(
        lay_out=_lay_out,
        take_back=_take_back,
        d_axis=lambda name: 0,
        to_hidden=functools.partial(_to_hidden, interpret=interpret),
        from_hidden=functools.partial(_from_hidden, interpret=interpret),
        gradients=functools.partial(_gradients, interpret=interpret),
    )


_COMPILED, _INTERPRETED = _products(False), _products(True)
