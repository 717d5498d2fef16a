"""The merged FFN's products by the kernels: padding, blocks, and what a call costs.

Letters: S segments, G of them at a time, T tokens per segment, D model, F FFN, b columns of F at a
time, E experts, P rows of D in one product.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lory_jax.model.merged_ffn import tiling as tilings
from lory_jax.model.merged_ffn.kernels import (
    Unroll,
    from_hidden_kernel,
    gather_spread,
    gradients_kernel,
    spread,
    to_hidden_kernel,
)
from lory_jax.model.merged_ffn.tiling import (
    FROM_HIDDEN,
    GRADIENTS,
    LANES,
    MAX_GROUP,
    ROWS,
    TO_HIDDEN,
    Problem,
    Tiling,
)
from lory_jax.model.merged_ffn.vjp import Combine, Products


class How(NamedTuple):
    """What is the same for all calls of a program.

    Attributes:
      interpret: run the kernels, slowly, anywhere.
      most: the most segments in a group.
    """

    interpret: bool
    most: int


@functools.cache
def kernel_products(interpret: bool = False, most: int = MAX_GROUP) -> Products:
    """The products as kernels for a TPU; arguments as in `How`."""
    how = How(interpret, most)
    return Products(
        lay_out=_lay_out,
        take_back=_take_back,
        d_axis=lambda name: 0,
        to_hidden=functools.partial(_to_hidden, how=how),
        from_hidden=functools.partial(_from_hidden, how=how),
        gradients=functools.partial(_gradients, how=how),
    )


@dataclass(frozen=True)
class _Call:
    """One call: its padded sizes, and its blocks by (group of segments, block of F, part of D)."""

    tiling: Tiling
    problem: Problem
    a_SPxPE: Array  # the result of `spread`
    weights: list[Array]
    how: How

    @property
    def groups(self) -> int:
        return self.problem.S // self.tiling.group

    @property
    def blocks(self) -> int:
        return self.problem.F // self.tiling.columns

    @property
    def part(self) -> int:
        """Size of a part of D."""
        return self.problem.D // self.tiling.parts

    @property
    def width(self) -> int:
        return self.tiling.rows * self.problem.E

    def spread_block(self) -> pl.BlockSpec:
        size = (self.tiling.group * self.tiling.rows, self.width)
        return pl.BlockSpec(size, lambda g, *_: (g, 0))

    def run(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        in_specs: Sequence[pl.BlockSpec],
        out_specs: Sequence[pl.BlockSpec],
        out_shape: Sequence[jax.ShapeDtypeStruct],
        scratch: Sequence[Any],
        suffix: str,
        *arguments: Array,
    ) -> Any:
        problem, tiling = self.problem, self.tiling
        # Interpreted, every step that is unrolled is compiled for nothing.
        unroll = Unroll(2, 2) if self.how.interpret else Unroll()
        call = pl.pallas_call(
            functools.partial(kernel, P=tiling.rows, unroll=unroll),
            grid=grid,
            in_specs=in_specs,
            out_specs=out_specs,
            out_shape=out_shape,
            scratch_shapes=scratch,
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=self._semantics(len(grid)),
                vmem_limit_bytes=tilings.vmem_limit(tilings.traced_chip().vmem),
            ),
            cost_estimate=pl.CostEstimate(
                flops=tilings.flops(problem, tiling, tilings.traced_chip().side),
                transcendentals=0,
                bytes_accessed=tilings.moved_bytes(problem, tiling),
            ),
            name=problem.kernel + suffix,
            interpret=self.how.interpret,
        )
        # Under remat, JAX would keep a kernel whose results are unused; it drops an unused jitted
        # function.
        return jax.jit(call)(*arguments)

    def _semantics(self, dimensions: int) -> Sequence[Literal["parallel", "arbitrary"]]:
        """Cores share the outer dimension of the grid if they can, the next if not."""
        outer, _ = tilings.shared(self.problem, self.tiling)
        is_shared = 0 if outer >= tilings.traced_chip().cores else 1
        return ["parallel" if i == is_shared else "arbitrary" for i in range(dimensions)]


def _prepare(
    kernel: str, weights: Sequence[Array], r_SxE: Array, T: int, hidden: int, how: How
) -> _Call:
    S, E = r_SxE.shape
    DE, F = weights[0].shape
    dtype = weights[0].dtype
    problem = Problem(kernel, len(weights), hidden, S, T, DE // E, F, E, dtype.itemsize)
    tiling = tilings.tile(problem, tilings.traced_chip(), how.most)
    r_SxE = pad(r_SxE, (tiling.group, tiling.experts))
    padded = [_pad_experts(w, E, tiling) for w in weights]
    (S, E), (DE, F) = r_SxE.shape, padded[0].shape
    problem = dataclasses.replace(problem, S=S, T=T + -T % tiling.tokens, D=DE // E, F=F, E=E)
    return _Call(tiling, problem, spread(r_SxE, tiling, dtype), padded, how)


def _pad_experts(w_DExF: Array, E: int, tiling: Tiling) -> Array:
    if (w_DExF.shape[0] // E) % ROWS or E % tiling.experts:
        w_DxExF = pad(w_DExF.reshape(-1, E, w_DExF.shape[1]), (ROWS, tiling.experts, 1))
        w_DExF = w_DxExF.reshape(-1, w_DExF.shape[1])
    return pad(w_DExF, (1, tiling.columns))


def pad(x: Array, multiples: tuple[int, ...]) -> Array:
    """Pads the end of every axis with zeros up to these multiples; returns x itself if it fits."""
    widths = [(0, -size % multiple) for size, multiple in zip(x.shape, multiples, strict=True)]
    return jnp.pad(x, widths) if any(width for _, width in widths) else x


def _to_hidden(
    x_SxTxD: Array,
    weights: Mapping[str, Array],
    r_SxE: Array,
    combine: Combine,
    *given: Array,
    how: How,
) -> tuple[Array, ...]:
    (S, T, _), F = x_SxTxD.shape, next(iter(weights.values())).shape[1]
    h = jax.ShapeDtypeStruct((S, T, F), jnp.float32)
    outs = len(jax.eval_shape(combine, *[h] * (len(weights) + len(given))))
    hidden = len(given) + outs
    call = _prepare(TO_HIDDEN, list(weights.values()), r_SxE, T, hidden, how)
    G, b, padded = call.tiling.group, call.tiling.columns, call.problem
    out = jax.ShapeDtypeStruct((padded.S, padded.T, padded.F), x_SxTxD.dtype)
    hidden_block = pl.BlockSpec((G, padded.T, b), lambda g, f, k, d: (g, 0, f))
    parts = call.tiling.parts

    def experts_block(matrix: int) -> pl.BlockSpec:
        def index(g: Any, f: Any, k: Any, d: Any) -> tuple[Any, Any]:
            # Before its turn, a matrix's first part waits; after it, the last one stays.
            return jnp.clip((k - matrix) * parts + d, 0, parts - 1), f

        return pl.BlockSpec((call.part * padded.E, b), index)

    results = call.run(
        functools.partial(
            to_hidden_kernel, weights=len(weights), given=len(given), combine=combine
        ),
        (call.groups, call.blocks, len(weights), parts),
        [
            call.spread_block(),
            # A group's x stays for all its blocks: room to fetch the next group's is not worth it.
            pl.BlockSpec(
                (G, padded.T, padded.D), lambda g, f, k, d: (g, 0, 0), pipeline_mode=pl.Buffered(1)
            ),
            *map(experts_block, range(len(weights))),
            *[hidden_block] * len(given),
        ],
        [hidden_block] * outs,
        [out] * outs,
        [
            *[pltpu.VMEM((len(weights) - 1, G, padded.T, b), jnp.float32)] * (len(weights) > 1),
            pltpu.VMEM((G, padded.D, b), x_SxTxD.dtype),
        ],
        "_backward" if given else "",
        call.a_SPxPE,
        pad(x_SxTxD, (G, call.tiling.tokens, ROWS)),
        *call.weights,
        *(pad(h_SxTxF, (G, call.tiling.tokens, b)) for h_SxTxF in given),
    )
    return tuple(h_SxTxF[:S, :T, :F] for h_SxTxF in results)


def _from_hidden(
    hidden: Mapping[str, Array], weights: Mapping[str, Array], r_SxE: Array, *, how: How
) -> Array:
    first = next(iter(hidden.values()))
    (S, T, _), D = first.shape, next(iter(weights.values())).shape[0] // r_SxE.shape[1]
    matrices = [weights[name] for name in hidden]
    call = _prepare(FROM_HIDDEN, matrices, r_SxE, T, len(hidden), how)
    G, b, padded = call.tiling.group, call.tiling.columns, call.problem
    hidden_block = pl.BlockSpec((G, padded.T, b), lambda g, d, f: (g, 0, f))
    experts_block = pl.BlockSpec((call.part * padded.E, b), lambda g, d, f: (d, f))
    (y_SxTxD,) = call.run(
        functools.partial(from_hidden_kernel, weights=len(hidden)),
        (call.groups, call.tiling.parts, call.blocks),
        [
            call.spread_block(),
            *[hidden_block] * len(hidden),
            *[experts_block] * len(hidden),
        ],
        [pl.BlockSpec((G, padded.T, call.part), lambda g, d, f: (g, 0, d))],
        [jax.ShapeDtypeStruct((padded.S, padded.T, padded.D), first.dtype)],
        [
            pltpu.VMEM((len(hidden), G, call.part, b), first.dtype),
            pltpu.VMEM((G, padded.T, call.part), jnp.float32),
        ],
        "_backward" if len(hidden) > 1 else "",
        call.a_SPxPE,
        *(pad(h_SxTxF, (G, call.tiling.tokens, b)) for h_SxTxF in hidden.values()),
        *call.weights,
    )
    return y_SxTxD[:S, :T, :D]


def _gradients(
    x_SxTxD: Array, h_SxTxF: Array, w_DExF: Array, r_SxE: Array, name: str, *, how: How
) -> tuple[Array, Array]:
    (S, T, D), E, F = x_SxTxD.shape, r_SxE.shape[1], w_DExF.shape[1]
    call = _prepare(GRADIENTS, [w_DExF], r_SxE, T, 1, how)
    G, P, b, padded = call.tiling.group, call.tiling.rows, call.tiling.columns, call.problem
    parts, part, width, DE = call.tiling.parts, call.part, call.width, padded.D * padded.E
    held = padded.S if call.tiling.is_held else G
    dw_DExF, dr = call.run(
        gradients_kernel,
        (parts, call.blocks, call.groups),
        [
            pl.BlockSpec((1, width, G * P), lambda d, f, g: (g, 0, 0)),
            pl.BlockSpec((held, part, padded.T), lambda d, f, g: (g * G // held, d, 0)),
            pl.BlockSpec((G, padded.T, b), lambda d, f, g: (g, 0, f)),
            pl.BlockSpec((part * padded.E, b), lambda d, f, g: (d, f)),
        ],
        [
            pl.BlockSpec((part * padded.E, b), lambda d, f, g: (d, f)),
            pl.BlockSpec((1, 1, 1, G * P, width), lambda d, f, g: (f, d, g, 0, 0)),
        ],
        [
            jax.ShapeDtypeStruct((DE, padded.F), w_DExF.dtype),
            jax.ShapeDtypeStruct((call.blocks, parts, call.groups, G * P, width), jnp.float32),
        ],
        [
            pltpu.VMEM((G, part, b), jnp.float32),
            pltpu.VMEM((part * padded.E, b), jnp.float32),
        ],
        "",
        call.a_SPxPE.reshape(call.groups, G * P, width).mT,
        pad(x_SxTxD, (G, call.tiling.tokens, ROWS)).mT,
        pad(h_SxTxF, (G, call.tiling.tokens, b)),
        call.weights[0],
    )
    dr_SPxPE = jnp.sum(dr, axis=(0, 1)).reshape(padded.S * P, width)
    dr_SxE = gather_spread(dr_SPxPE, call.tiling)
    if (padded.D, padded.E) != (D, E):
        dw_DExF = dw_DExF.reshape(padded.D, padded.E, -1)[:D, :E].reshape(D * E, -1)
    return dw_DExF[:, :F], dr_SxE[:S, :E]


def _lay_out(w: Array, name: str) -> Array:
    """`[D * E, F]`, D outermost, F padded. This is done once, rather than in every call."""
    w_DxExF = w.transpose((2, 0, 1) if name == "down" else (1, 0, 2))
    return pad(w_DxExF.reshape(-1, w_DxExF.shape[2]), (1, LANES))


def _take_back(w_DExF: Array, name: str, shape: tuple[int, ...]) -> Array:
    E, F = shape[0], shape[1 if name == "down" else 2]
    w_DxExF = w_DExF[:, :F].reshape(-1, E, F)
    return w_DxExF.transpose((1, 2, 0) if name == "down" else (1, 0, 2))
