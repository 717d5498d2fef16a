"""Tokens through the experts whose gates are open, block by block, and nothing through the others.

The tokens of an expert are visited in blocks of rows. How many blocks there are is known only when
the gates are, so a loop runs as often as they say: the work is that of the open gates, rounded up
to whole blocks for every expert. The gradient of such a loop is written here by hand.

Letters: B batch, L sequence, M = B * L tokens, R rows of a block, D model, F FFN, E experts.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from lory_jax.model.experts import (
    BATCH_SPEC,
    EXPERT_SPECS,
    MATRICES,
    TENSOR,
    Experts,
    gather_matrices,
)
from lory_jax.model.merged_ffn import swiglu
from lory_jax.parallel import has_mesh, on_mesh

BLOCK = 128  # rows: enough for a product near a CPU's rate, few enough to pad little


def open_gates_ffn(x_BxLxD: Array, gates_BxLxE: Array, experts: Experts) -> Array:
    """The sum of the experts' outputs, each multiplied by its gate: `[B, L, D]` in x's type.

    A gate that is not above 0 is closed: neither its expert's output nor its own gradient is
    computed. On a mesh, every device visits its own tokens with its own slice of F.

    Args:
      x_BxLxD: hidden states, in the compute type.
      gates_BxLxE: float32.
      experts: `{"gate": [E, D, F], "up": [E, D, F], "down": [E, F, D]}`.
    """
    run = on_mesh(_open_gates_ffn, (BATCH_SPEC, BATCH_SPEC, EXPERT_SPECS), BATCH_SPEC)
    return run(x_BxLxD, gates_BxLxE, {name: experts[name] for name in MATRICES})


def _open_gates_ffn(x_BxLxD: Array, gates_BxLxE: Array, experts: Experts) -> Array:
    D, E = x_BxLxD.shape[-1], gates_BxLxE.shape[-1]
    matrices = gather_matrices(experts, x_BxLxD.dtype)
    with jax.named_scope("expert_ffn"):
        y_MxD = block_ffn(x_BxLxD.reshape(-1, D), gates_BxLxE.reshape(-1, E), *matrices)
    if has_mesh():
        y_MxD = jax.lax.psum(y_MxD, TENSOR)
    return y_MxD.astype(x_BxLxD.dtype).reshape(x_BxLxD.shape)


class _Blocks(NamedTuple):
    """Which tokens each block holds."""

    open_ExM: Array  # how many of an expert's gates are open up to and with each token
    blocks_E: Array  # how many blocks each expert has
    ends_E: Array  # and all experts up to and with it
    rows: int  # of a block

    def expert_and_tokens(self, block: Array) -> tuple[Array, Array]:
        """The expert of a block and its tokens `[R]` in order; M in place of those it lacks."""
        expert = jnp.sum(block >= self.ends_E)
        first = (block - self.ends_E[expert] + self.blocks_E[expert]) * self.rows
        wanted_R = first + 1 + jnp.arange(self.rows)
        tokens_R = jnp.searchsorted(self.open_ExM[expert], wanted_R, method="scan_unrolled")
        return expert, tokens_R


def _blocks(gates_MxE: Array) -> _Blocks:
    open_ExM = jnp.cumsum(gates_MxE.T > 0, axis=1, dtype=jnp.int32)
    rows = min(BLOCK, len(gates_MxE))
    blocks_E = -(-open_ExM[:, -1] // rows)
    return _Blocks(open_ExM, blocks_E, jnp.cumsum(blocks_E), rows)


def _take(rows_Mx: Array, tokens_R: Array) -> Array:
    """The rows of a block; zeros where it lacks a token."""
    return rows_Mx.at[tokens_R].get(mode="fill", fill_value=0, indices_are_sorted=True)


def _add(sum_Mx: Array, tokens_R: Array, rows_Rx: Array) -> Array:
    """Adds the rows of a block to those of its tokens."""
    return sum_Mx.at[tokens_R].add(rows_Rx, mode="drop", indices_are_sorted=True)


@jax.custom_vjp
def block_ffn(
    x_MxD: Array, gates_MxE: Array, gate_ExDxF: Array, up_ExDxF: Array, down_ExFxD: Array
) -> Array:
    """The experts' outputs times their gates, summed over those that are open: float32 `[M, D]`."""
    blocks, matrices = _blocks(gates_MxE), (gate_ExDxF, up_ExDxF, down_ExFxD)

    def visit(block: Array, y_MxD: Array) -> Array:
        e, tokens_R = blocks.expert_and_tokens(block)
        y_RxD = swiglu(_take(x_MxD, tokens_R), *(w[e] for w in matrices))
        gates_Rx1 = _take(gates_MxE[:, e], tokens_R)[:, None]
        return _add(y_MxD, tokens_R, y_RxD.astype(jnp.float32) * gates_Rx1)

    zeros_MxD = jnp.zeros(x_MxD.shape, jnp.float32)
    return jax.lax.fori_loop(0, blocks.ends_E[-1], visit, zeros_MxD)


def _forward(*inputs: Array) -> tuple[Array, tuple[Array, ...]]:
    return block_ffn(*inputs), inputs


def _backward(inputs: tuple[Array, ...], dy_MxD: Array) -> tuple[Array, ...]:
    x_MxD, gates_MxE, *matrices = inputs
    blocks = _blocks(gates_MxE)

    def visit(block: Array, sums: Any) -> Any:
        dx_MxD, dgates_ExM, gradients = sums
        e, tokens_R = blocks.expert_and_tokens(block)
        y_RxD, pull = jax.vjp(swiglu, _take(x_MxD, tokens_R), *(w[e] for w in matrices))
        dy_RxD = _take(dy_MxD, tokens_R)
        dgates_R = jnp.sum(y_RxD.astype(jnp.float32) * dy_RxD, axis=-1)
        gates_Rx1 = _take(gates_MxE[:, e], tokens_R)[:, None]
        dx_RxD, *of_expert = pull((dy_RxD * gates_Rx1).astype(y_RxD.dtype))
        return (
            _add(dx_MxD, tokens_R, dx_RxD.astype(jnp.float32)),
            dgates_ExM.at[e, tokens_R].add(dgates_R, mode="drop", indices_are_sorted=True),
            [total.at[e].add(g) for total, g in zip(gradients, of_expert, strict=True)],
        )

    like = (x_MxD, gates_MxE.T, matrices)
    zeros = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), like)
    dx_MxD, dgates_ExM, gradients = jax.lax.fori_loop(0, blocks.ends_E[-1], visit, zeros)
    typed = (g.astype(w.dtype) for g, w in zip(gradients, matrices, strict=True))
    return dx_MxD.astype(x_MxD.dtype), dgates_ExM.T.astype(gates_MxE.dtype), *typed


block_ffn.defvjp(_forward, _backward)
