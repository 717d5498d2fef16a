"""Experts as low-rank deltas of one shared FFN (`config.model.expert_rank`), beyond the paper.

A layer holds one full FFN W0 and, for each of its matrices, E deltas A_e B_e of rank r, which the
routing weights of a segment merge:

    W(s)    =  W0 + sum_e r_e A_e B_e
    x W(s)  =  x W0 + ([r_1 x A_1, ..., r_E x A_E]) [B_1; ...; B_E]

The second line needs no merged matrix, so a merge costs nothing, and short segments cost what long
ones do. What it costs instead is 2 E r (D + F) FLOPs per token and matrix, forward. A layer has the
parameters of 1 + E r (1/D + 1/F) dense FFNs, instead of E.

A_e starts random and B_e at zero (as in LoRA, Hu et al. 2021, arXiv 2106.09685): a model that is
upcycled from a dense one computes what that did, and each expert learns to differ from the first
step on.

FFNs are dicts: `{"gate": [D, F], "up": [D, F], "down": [F, D]}`, perhaps with biases `[F]` or `[D]`
that all experts share, and `{"gate_a": [E, D, r], "gate_b": [E, r, F], ...}`.

Letters: R routings, D model, F FFN, E experts, r rank; M and N what a matrix reads and makes.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name

from lory_jax.model.experts import BIASES, DENSE_AXES, MATRICES
from lory_jax.model.merged_ffn import SAVED_HIDDEN

# The logical axes of both factors of every delta.
_FACTOR_AXIS = {"embed": "embed", "mlp": "factor_mlp"}
FACTOR_AXES = {
    f"{name}_a": ("experts", _FACTOR_AXIS[axes[0]], "rank") for name, axes in DENSE_AXES.items()
} | {f"{name}_b": ("experts", "rank", _FACTOR_AXIS[axes[1]]) for name, axes in DENSE_AXES.items()}


def shared_by_experts(ffn: Mapping[str, Array]) -> tuple[str, ...]:
    """The names of what all experts share in an FFN; none, if its experts are full."""
    return tuple(n for n in (*MATRICES, *BIASES) if n in ffn) if "gate_a" in ffn else ()


def low_rank_ffn(x_BxLxD: Array, ffn: Mapping[str, Array], r_BxLxE: Array) -> Array:
    """The SwiGLU FFN `[B, L, D]` of the shared matrices and of the deltas, merged for each token.

    Args:
      x_BxLxD: hidden states, in the compute type.
      ffn: the shared FFN and the factors, of any float type.
      r_BxLxE: the routing weights of every token, which are those of its segment.
    """
    dtype = x_BxLxD.dtype
    r_BxLxEx1 = r_BxLxE.astype(dtype)[..., None]

    def product(x_BxLxM: Array, name: str) -> Array:
        y_BxLxN = jnp.matmul(x_BxLxM, ffn[name].astype(dtype))
        inner_BxLxExr = jnp.einsum("blm,emr->bler", x_BxLxM, ffn[f"{name}_a"].astype(dtype))
        y_BxLxN += jnp.einsum(
            "bler,ern->bln", r_BxLxEx1 * inner_BxLxExr, ffn[f"{name}_b"].astype(dtype)
        )
        bias_N = ffn.get(f"{name}_bias")
        if bias_N is None:
            return y_BxLxN
        return y_BxLxN + jnp.broadcast_to(bias_N.astype(dtype), y_BxLxN.shape)

    with jax.named_scope("expert_ffn"):
        gate_BxLxF = checkpoint_name(product(x_BxLxD, "gate"), SAVED_HIDDEN)
        up_BxLxF = checkpoint_name(product(x_BxLxD, "up"), SAVED_HIDDEN)
        return product(jax.nn.silu(gate_BxLxF) * up_BxLxF, "down")


def merge_low_rank(ffn: Mapping[str, Array], r_RxE: Array) -> dict[str, Array]:
    """The dense FFNs that the routing weights stand for: `{"gate": [R, D, F], ...}`, in their type.

    For decoding and exports, which use a merge for many tokens.
    """
    merged = {}
    with jax.named_scope("merge"):
        for name in MATRICES:
            a_ExMxr, b_ExrxN = ffn[f"{name}_a"], ffn[f"{name}_b"]
            weighted_RxExMxr = r_RxE.astype(a_ExMxr.dtype)[:, :, None, None] * a_ExMxr[None]
            delta_RxMxN = jnp.einsum(
                "semr,ern->smn", weighted_RxExMxr, b_ExrxN, preferred_element_type=jnp.float32
            )
            whole_1xMxN = ffn[name].astype(jnp.float32)[None]
            merged[name] = (whole_1xMxN + delta_RxMxN).astype(ffn[name].dtype)
    for name in BIASES:
        if name in ffn:
            merged[name] = jnp.broadcast_to(ffn[name][None], (len(r_RxE), *ffn[name].shape))
    return merged
