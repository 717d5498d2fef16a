"""Merging in the plainest way: what every implementation must agree with, and what inference uses.

Letters: S segments, T tokens per segment, D model, F FFN, E experts.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from lory_jax.model.experts import Experts

SAVED_HIDDEN = "ffn_hidden"  # the checkpoint name of gate and up


def swiglu(x_xTxD: Array, gate_xDxF: Array, up_xDxF: Array, down_xFxD: Array) -> Array:
    """The SwiGLU FFN; leading dimensions are batch dimensions of both sides (or absent)."""
    return apply_ffn(x_xTxD, {"gate": gate_xDxF, "up": up_xDxF, "down": down_xFxD})


def apply_ffn(x_xTxD: Array, ffn: Mapping[str, Array]) -> Array:
    """The SwiGLU FFN of matrices by name, with biases such as `gate_bias` (`[..., F]`) if any."""

    def product(name: str, input_xTxM: Array) -> Array:
        output_xTxN = jnp.matmul(input_xTxM, ffn[name])
        bias_xN = ffn.get(f"{name}_bias")
        if bias_xN is None:
            return output_xTxN
        return output_xTxN + jnp.broadcast_to(bias_xN[..., None, :], output_xTxN.shape)

    gate_xTxF = checkpoint_name(product("gate", x_xTxD), SAVED_HIDDEN)
    up_xTxF = checkpoint_name(product("up", x_xTxD), SAVED_HIDDEN)
    return product("down", jax.nn.silu(gate_xTxF) * up_xTxF)


def merge(w_Ex: Array, r_SxE: Array) -> Array:
    """sum_i r_i * w_i for every segment: `[S, ...]` in w's type, accumulated in float32."""
    merged_Sx = jnp.einsum(
        "se,e...->s...", r_SxE.astype(w_Ex.dtype), w_Ex, preferred_element_type=jnp.float32
    )
    return merged_Sx.astype(w_Ex.dtype)


def merge_experts(experts: Experts, r_SxE: Array) -> dict[str, Array]:
    """One FFN per segment: `{"gate": [S, D, F], "up": [S, D, F], "down": [S, F, D]}`, biases."""
    with jax.named_scope("merge"):
        return {name: merge(w, r_SxE) for name, w in experts.items()}


def einsum_ffn(x_SxTxD: Array, experts: Experts, r_SxE: Array) -> Array:
    """Merges everything at once, and leaves the gradients to JAX."""
    experts = {name: w.astype(x_SxTxD.dtype) for name, w in experts.items()}
    merged = merge_experts(experts, r_SxE)
    with jax.named_scope("expert_ffn"):
        return apply_ffn(x_SxTxD, merged)
