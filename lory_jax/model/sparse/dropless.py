"""Tokens through the experts that they chose, without slots: none is dropped.

The tokens are sorted by expert, and each run of them is multiplied with the matrices of its expert.
`config.model.grouped_product` says how:

    "ragged"  `jax.lax.ragged_dot`, for which TPUs have a kernel; on CPUs it multiplies every token
              with all experts and masks the products
    "blocks"  every run is padded to whole blocks of rows, and one batched product multiplies each
              block with a copy of its expert's matrices

Letters: B batch, L sequence, k experts per token, A = B * L * k choices, M = B * L tokens, P padded
rows, D model, F FFN, E experts.
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from lory_jax.model.experts import (
    BATCH_SPEC,
    D_AXIS,
    EXPERT_SPECS,
    FSDP,
    MATRICES,
    TENSOR,
    Experts,
)
from lory_jax.model.merged_ffn import swiglu
from lory_jax.parallel import has_mesh, on_mesh

BLOCK = 64  # rows: enough for a product near a CPU's rate, few enough to pad little


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
    specs_in = (BATCH_SPEC, BATCH_SPEC, BATCH_SPEC, EXPERT_SPECS)
    run = on_mesh(functools.partial(_chosen_ffn, grouped_product), specs_in, BATCH_SPEC)
    return run(x_BxLxD, weights_BxLxk, experts_BxLxk, experts)


def _chosen_ffn(
    grouped_product: str,
    x_BxLxD: Array,
    weights_BxLxk: Array,
    experts_BxLxk: Array,
    experts: Experts,
) -> Array:
    B, L, D = x_BxLxD.shape
    k = weights_BxLxk.shape[-1]
    whole = {name: w.astype(x_BxLxD.dtype) for name, w in experts.items()}
    if has_mesh():
        whole = {
            name: jax.lax.all_gather(w, FSDP, axis=D_AXIS[name], tiled=True)
            for name, w in whole.items()
        }
    chosen_A = experts_BxLxk.reshape(-1)
    order_A = jnp.argsort(chosen_A)
    sizes_E = jnp.bincount(chosen_A, length=len(whole["gate"]))
    tokens_A = order_A // k
    x_AxD = x_BxLxD.reshape(-1, D)[tokens_A]
    with jax.named_scope("expert_ffn"):
        product = ragged_ffn if grouped_product == "ragged" else block_ffn
        y_AxD = product(x_AxD, sizes_E, *(whole[name] for name in MATRICES))
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


def block_ffn(
    x_AxD: Array, sizes_E: Array, gate_ExDxF: Array, up_ExDxF: Array, down_ExFxD: Array
) -> Array:
    """What `ragged_ffn` returns, by blocks of rows that share an expert."""
    (A, D), E = x_AxD.shape, len(sizes_E)
    # However the rows are divided, no expert needs more than one block that is not full.
    blocks = A // BLOCK + min(A, E)
    ends_E = jnp.cumsum(-(-sizes_E // BLOCK))  # in blocks
    expert_of_block = jnp.searchsorted(ends_E, jnp.arange(blocks), side="right")
    expert_of_block = jnp.minimum(expert_of_block, E - 1)  # of the blocks that stay empty
    # How far padding shifts the rows of each expert.
    shift_E = jnp.concatenate([jnp.zeros(1, ends_E.dtype), ends_E[:-1]]) * BLOCK
    shift_E -= jnp.cumsum(sizes_E) - sizes_E
    rows_A = jnp.arange(A) + jnp.repeat(shift_E, sizes_E, total_repeat_length=A)
    x_PxD = jnp.zeros((blocks * BLOCK, D), x_AxD.dtype).at[rows_A].set(x_AxD, unique_indices=True)
    matrices = (w[expert_of_block] for w in (gate_ExDxF, up_ExDxF, down_ExFxD))
    return swiglu(x_PxD.reshape(blocks, BLOCK, D), *matrices).reshape(-1, D)[rows_A]
