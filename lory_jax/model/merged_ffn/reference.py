"""Merging in the plainest way: what every implementation must agree with, and what inference uses.

Letters: S segments, T tokens per segment, D model, F FFN, E experts.
"""

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from lory_jax.model.experts import Experts

SAVED_HIDDEN = "ffn_hidden"  # the checkpoint name of gate and up


def swiglu(x_xTxD: Array, gate_xDxF: Array, up_xDxF: Array, down_xFxD: Array) -> Array:
    """The SwiGLU FFN; leading dimensions are batch dimensions of both sides (or absent)."""
    gate_xTxF = checkpoint_name(jnp.matmul(x_xTxD, gate_xDxF), SAVED_HIDDEN)
    up_xTxF = checkpoint_name(jnp.matmul(x_xTxD, up_xDxF), SAVED_HIDDEN)
    return jnp.matmul(jax.nn.silu(gate_xTxF) * up_xTxF, down_xFxD)


def merge(w_ExMxN: Array, r_SxE: Array) -> Array:
    """sum_i r_i * w_i for every segment: `[S, M, N]` in w's type, accumulated in float32."""
    merged_SxMxN = jnp.einsum(
        "se,emn->smn", r_SxE.astype(w_ExMxN.dtype), w_ExMxN, preferred_element_type=jnp.float32
    )
    return merged_SxMxN.astype(w_ExMxN.dtype)


def merge_experts(experts: Experts, r_SxE: Array) -> dict[str, Array]:
    """One FFN per segment: `{"gate": [S, D, F], "up": [S, D, F], "down": [S, F, D]}`."""
    with jax.named_scope("merge"):
        return {name: merge(w, r_SxE) for name, w in experts.items()}


def einsum_ffn(x_SxTxD: Array, experts: Experts, r_SxE: Array) -> Array:
    """Merges everything at once, and leaves the gradients to JAX."""
    experts = {name: w.astype(x_SxTxD.dtype) for name, w in experts.items()}
    merged = merge_experts(experts, r_SxE)
    with jax.named_scope("expert_ffn"):
        return swiglu(x_SxTxD, merged["gate"], merged["up"], merged["down"])
