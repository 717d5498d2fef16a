"""Causal flash attention with rotation inside, for heads of 64 on TPUs, two heads at a time.

q, k, v, the result and all gradients are `[B, L, D]` as matrix products make and read them, with
the H = D / 64 heads side by side. paired_kernels.py says how it works.

Letters: B batch, L sequence, D = 64 H, K = 64 head width, P = H / 2 pairs of heads, b queries or
keys of a block.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from lory_jax.model.attention.names import SAVED_ATTENTION
from lory_jax.model.attention.paired_kernels import (
    LANES,
    LOG_2,
    STRIP,
    SUBLANES,
    K,
    backward_kernel,
    forward_kernel,
    schedule,
)
from lory_jax.model.merged_ffn.tiling import traced_chip
from lory_jax.model.rope import Rope

BLOCKS = (1024, 512, 256, 128)  # the largest that divides L is chosen
SCALE = K**-0.5 / LOG_2  # of scores, whose softmax is in powers of two

FORWARD, BACKWARD = "paired_attention_forward", "paired_attention_backward"
PRODUCTS = {FORWARD: 2, BACKWARD: 5}  # matrix products of a block of scores

VMEM_LIMIT = 48 * 2**20  # bytes of on-chip memory; a v5p has 64 MiB


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def paired_attention(
    q_BxLxD: Array, k_BxLxD: Array, v_BxLxD: Array, rope: Rope, interpret: bool = False
) -> Array:
    """Rotates q and k and attends causally, head by head: `[B, L, D]` in their type.

    Args:
      q_BxLxD: queries, an even number of heads of 64 side by side; L is a multiple of 128.
      k_BxLxD: keys, as many heads.
      v_BxLxD: values, as many heads.
      rope: the rotary embedding; positions count from the beginning of the row.
      interpret: run, slowly, on any platform.
    """
    return _fwd(q_BxLxD, k_BxLxD, v_BxLxD, rope, interpret)[0]


def _fwd(
    q: Array, k: Array, v: Array, rope: Rope, interpret: bool
) -> tuple[Array, tuple[Array, ...]]:
    o, lse = _forward(q, k, v, *_tables(q.shape[1], rope), interpret)
    o, lse = (checkpoint_name(x, SAVED_ATTENTION) for x in (o, lse))
    return o, (q, k, v, o, lse)


def _bwd(rope: Rope, interpret: bool, saved: tuple[Array, ...], do: Array) -> tuple[Array, ...]:
    q, k, v, o, lse = saved
    return _backward(q, k, v, *_tables(q.shape[1], rope), o, lse, do, interpret)


paired_attention.defvjp(_fwd, _bwd)


def _tables(L: int, rope: Rope) -> tuple[Array, Array]:
    """What a lane is multiplied by, and what the lane half a head away is: float32 `[L, 128]`."""
    cos_LxK2, sin_LxK2 = rope.rotation(jnp.arange(L), K)
    cos = jnp.concatenate([cos_LxK2, cos_LxK2] * 2, axis=1)
    return cos, jnp.concatenate([-sin_LxK2, sin_LxK2] * 2, axis=1)


def _forward(
    q: Array, k: Array, v: Array, cos: Array, sin: Array, interpret: bool
) -> tuple[Array, Array]:
    (B, L, D), b = q.shape, block_size(q.shape[1])
    in_block = pl.BlockSpec((None, b, LANES), lambda n, p, t, i, j: (n, i[t], p))
    lse_block = pl.BlockSpec((None, None, 2, b), lambda n, p, t, i, j: (n, p, 0, i[t]))
    o, lse_BxPx2xL = _call(
        FORWARD,
        forward_kernel,
        schedule(L // b, by_keys=False),
        [in_block, _whole(L), _whole(L), _table(L), _table(L)],
        [in_block, lse_block],
        [q, jax.ShapeDtypeStruct((B, D // LANES, 2, L), jnp.float32)],
        [
            pltpu.VMEM((2, b, LANES), q.dtype),
            pltpu.VMEM((L, LANES), q.dtype),
            pltpu.VMEM((2, b, LANES), jnp.float32),
            pltpu.VMEM((2, b, LANES), jnp.float32),
        ],
        interpret,
        *(q, k, v, cos, sin),
    )
    return o, lse_BxPx2xL


def _backward(
    q: Array,
    k: Array,
    v: Array,
    cos: Array,
    sin: Array,
    o: Array,
    lse: Array,
    do: Array,
    interpret: bool,
) -> tuple[Array, ...]:
    L, b = q.shape[1], block_size(q.shape[1])
    in_block = pl.BlockSpec((None, b, LANES), lambda n, p, t, i, j: (n, j[t], p))
    whole, table = _whole(L), _table(L)
    whole_lse = pl.BlockSpec((None, None, 2, L), lambda n, p, t, i, j: (n, p, 0, 0))
    dq, dk, dv = _call(
        BACKWARD,
        backward_kernel,
        schedule(L // b, by_keys=True),
        [whole, in_block, in_block, table, table, whole, whole_lse, whole],
        [whole, in_block, in_block],
        [q, k, v],
        [
            pltpu.VMEM((L, LANES), q.dtype),
            pltpu.VMEM((2, b, LANES), q.dtype),
            pltpu.VMEM((SUBLANES, L), jnp.float32),
            pltpu.VMEM((L, LANES), jnp.float32),
            pltpu.VMEM((b, LANES), jnp.float32),
            pltpu.VMEM((b, LANES), jnp.float32),
        ],
        interpret,
        *(q, k, v, cos, sin, o, lse, do),
    )
    return dq, dk, dv


def matrix_unit_flops(name: str, heads: int, L: int, side: int) -> int:
    """FLOPs that the matrix unit spends, of `side` rows and columns; those of padding count, too.

    Every product contracts a head or returns one, whose 64 numbers take the time of `side`.
    """
    b = block_size(L)
    blocks, strips = L // b, -(-b // STRIP)
    # A block on the diagonal computes (strips + 1) / 2 of its `strips` rows of squares.
    squares = blocks * (blocks - 1) // 2 * 2 * strips + blocks * (strips + 1)
    return PRODUCTS[name] * 2 * side * heads * b * b * squares // (2 * strips)


def block_size(L: int) -> int:
    """Queries and keys of a block."""
    return next(b for b in BLOCKS if L % b == 0)


def _whole(L: int) -> pl.BlockSpec:
    return pl.BlockSpec((None, L, LANES), lambda n, p, t, i, j: (n, 0, p))


def _table(L: int) -> pl.BlockSpec:
    """It is the same for all, so it is not fetched twice to be ready for the next."""
    return pl.BlockSpec((L, LANES), lambda n, p, t, i, j: (0, 0), pipeline_mode=pl.Buffered(1))


def _call(
    name: str,
    kernel: Any,
    steps_2xN: np.ndarray,
    in_specs: Sequence[pl.BlockSpec],
    out_specs: Sequence[pl.BlockSpec],
    outs: Sequence[Any],
    scratch: Sequence[Any],
    interpret: bool,
    *arguments: Array,
) -> Any:
    """Runs a kernel for every sequence and pair of heads, over the steps of a schedule."""
    B, L, D = arguments[0].shape
    heads = B * (D // K)
    call = pl.pallas_call(
        functools.partial(kernel, scale=SCALE),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(B, D // LANES, steps_2xN.shape[1]),
            in_specs=in_specs,
            out_specs=out_specs,
            scratch_shapes=scratch,
        ),
        out_shape=[jax.ShapeDtypeStruct(out.shape, out.dtype) for out in outs],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=VMEM_LIMIT,
        ),
        cost_estimate=pl.CostEstimate(
            flops=matrix_unit_flops(name, heads, L, traced_chip().side),
            transcendentals=heads * L * (L + 1) // 2,
            bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*arguments, *outs)),
        ),
        name=name,
        interpret=interpret,
    )
    # Under remat, JAX would keep a kernel whose results are unused; it drops an unused jitted
    # function.
    return jax.jit(call)(*steps_2xN, *arguments)
