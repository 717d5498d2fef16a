"""Tokens through the experts that they chose, without slots: none is dropped.

`config.model.grouped_product` says how the tokens of an expert are multiplied with its matrices:

    "ragged"  sorted by expert, by `jax.lax.ragged_dot`, for which TPUs have a kernel; on CPUs it
              multiplies every token with all experts and masks the products
    "blocks"  a loop over blocks of an expert's tokens (blocks.py), with the weights as gates

Letters: B batch, L sequence, k experts per token, A = B * L * k choices, M = B * L tokens, D model,
F FFN, E experts.
"""

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
from lory_jax.model.sparse.blocks import open_gates_ffn
from lory_jax.parallel import has_mesh, on_mesh


def resolve_grouped_product(choice: str, platform: str) -> str:
    """`config.model.grouped_product` on a platform: "cpu", "gpu" or "tpu"."""
    if choice != "auto":
        return choice
    return "blocks" if platform == "cpu" else "ragged"


def chosen_ffn(
    x_BxLxD: Array,
    weights_BxLxk: Array,
    experts_BxLxk: Array,
    experts: Experts,
    grouped_product: str,
) -> Array:
    """Sends every token through its own k experts; returns the weighted sum `[B, L, D]`.

    On a mesh, every device multiplies its own tokens with its own slice of F.

    Args:
      x_BxLxD: hidden states, in the compute type.
      weights_BxLxk, experts_BxLxk: what `choose_experts` returns.
      experts: `{"gate": [E, D, F], "up": [E, D, F], "down": [E, F, D]}`.
      grouped_product: "ragged" or "blocks".
    """
    experts = {name: experts[name] for name in MATRICES}
    if grouped_product == "blocks":
        is_chosen_BxLxkxE = jax.nn.one_hot(experts_BxLxk, len(experts["gate"]))
        gates_BxLxE = jnp.sum(weights_BxLxk[..., None] * is_chosen_BxLxkxE, axis=2)
        return open_gates_ffn(x_BxLxD, gates_BxLxE, experts)
    specs_in = (BATCH_SPEC, BATCH_SPEC, BATCH_SPEC, EXPERT_SPECS)
    run = on_mesh(_sorted_ffn, specs_in, BATCH_SPEC)
    return run(x_BxLxD, weights_BxLxk, experts_BxLxk, experts)


def _sorted_ffn(
    x_BxLxD: Array, weights_BxLxk: Array, experts_BxLxk: Array, experts: Experts
) -> Array:
    B, L, D = x_BxLxD.shape
    k = weights_BxLxk.shape[-1]
    matrices = gather_matrices(experts, x_BxLxD.dtype)
    chosen_A = experts_BxLxk.reshape(-1)
    order_A = jnp.argsort(chosen_A)
    sizes_E = jnp.bincount(chosen_A, length=len(matrices[0]))
    tokens_A = order_A // k
    x_AxD = x_BxLxD.reshape(-1, D)[tokens_A]
    with jax.named_scope("expert_ffn"):
        y_AxD = ragged_ffn(x_AxD, sizes_E, *matrices)
    weighted_AxD = y_AxD.astype(jnp.float32) * weights_BxLxk.reshape(-1)[order_A, None]
    y_MxD = jnp.zeros((B * L, D), jnp.float32).at[tokens_A].add(weighted_AxD)
    if has_mesh():
        y_MxD = jax.lax.psum(y_MxD, TENSOR)
    return y_MxD.astype(x_BxLxD.dtype).reshape(B, L, D)


def ragged_ffn(
    x_AxD: Array, sizes_E: Array, gate_ExDxF: Array, up_ExDxF: Array, down_ExFxD: Array
) -> Array:
    """The first `sizes_E[0]` rows through expert 0, the next through expert 1, ...: `[A, D]`."""
    gate_AxF = jax.lax.ragged_dot(x_AxD, gate_ExDxF, sizes_E)
    up_AxF = jax.lax.ragged_dot(x_AxD, up_ExDxF, sizes_E)
    return jax.lax.ragged_dot(jax.nn.silu(gate_AxF) * up_AxF, down_ExFxD, sizes_E)
