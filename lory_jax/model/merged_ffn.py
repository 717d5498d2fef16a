"""The expert FFNs, merged in parameter space once per segment (paper, section 2.2).

Experts are a dict `{"gate": [E, D, F], "up": [E, D, F], "down": [E, F, D]}`, the layout in which
the model stores them. `merged_ffn` is the one entry; it picks an implementation:

    "einsum"  the plain reference: merges everything, then applies it; autodiff does the rest
    "blocks"  a loop over blocks of F with a hand-derived VJP: a block of merged weights is used at
              once and dropped, so that neither pass holds all segments' merged weights, and only
              x, the routing weights and the experts themselves are kept for the backward pass

Under a mesh, "blocks" runs inside `shard_map` and moves what must move itself: blocks of experts
are gathered over `fsdp` one at a time, activations travel over `tensor`, expert parameters and
their gradients never do (paper, section 6: expert-wise model parallelism).

Letters: S segments (B * N), T tokens per segment, D model, F FFN, E experts, b one block.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from lory_jax.parallel import RULES, partition_spec

Experts = Mapping[str, Array]

IMPLEMENTATIONS = ("blocks", "einsum")

MERGED_BYTES = 256 * 2**20  # of merged weights held at once, per device
BLOCK_MULTIPLE = 128  # lanes of a TPU register


def merged_ffn(
    x_SxTxD: Array, experts: Experts, r_SxE: Array, implementation: str = "blocks"
) -> Array:
    """Merges the experts with `r_SxE` and applies each segment's FFN to its tokens.

    Args:
      x_SxTxD: hidden states of S segments, in the compute type.
      experts: `{"gate": [E, D, F], "up": [E, D, F], "down": [E, F, D]}`.
      r_SxE: routing weights.
      implementation: one of `IMPLEMENTATIONS`.

    Returns:
      `[S, T, D]` in the type of `x_SxTxD`; differentiable in all three.
    """
    experts = {name: experts[name] for name in ("gate", "up", "down")}
    if implementation == "einsum":
        return einsum_ffn(x_SxTxD, experts, r_SxE)
    if implementation == "blocks":
        return blocks_ffn(x_SxTxD, experts, r_SxE)
    raise ValueError(
        f"implementation: got {implementation!r}, takes {' or '.join(IMPLEMENTATIONS)}"
    )


def from_expert_major(experts: Experts) -> dict[str, Array]:
    """Lays out `{"gate": [E, D, F], "up": [E, D, F], "down": [E, F, D]}` as the model stores it."""
    return {name: experts[name] for name in ("gate", "up", "down")}


# ---------------------------------------------------------------- the reference


def swiglu(x_xTxD: Array, gate_xDxF: Array, up_xDxF: Array, down_xFxD: Array) -> Array:
    """The SwiGLU FFN; leading dimensions are batch dimensions of both sides (or absent)."""
    gate_xTxF = jnp.matmul(x_xTxD, gate_xDxF)
    up_xTxF = jnp.matmul(x_xTxD, up_xDxF)
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
    """Merges everything at once: what the other implementations must agree with."""
    merged = merge_experts(_cast(experts, x_SxTxD), r_SxE)
    with jax.named_scope("expert_ffn"):
        return swiglu(x_SxTxD, merged["gate"], merged["up"], merged["down"])


def _cast(experts: Experts, like: Array) -> dict[str, Array]:
    return {name: w.astype(like.dtype) for name, w in experts.items()}


# ---------------------------------------------------------------- blocks of F, by hand

# Where the arguments lie under a mesh, and which mesh axis D and F are on.
SEGMENTS = partition_spec(("moe_batch",))
EXPERTS = {
    "gate": partition_spec(("experts", "embed", "mlp")),
    "up": partition_spec(("experts", "embed", "mlp")),
    "down": partition_spec(("experts", "mlp", "embed")),
}
(FSDP,), (TENSOR,) = RULES["embed"], RULES["mlp"]
REPLICAS = "data"
D_AXIS = {"gate": 1, "up": 1, "down": 2}
F_AXIS = {"gate": 2, "up": 2, "down": 1}


@jax.custom_vjp
def blocks_ffn(x_SxTxD: Array, experts: Experts, r_SxE: Array) -> Array:
    """The merged FFN block by block; see the top of this file."""
    run = _on_mesh(_forward, (SEGMENTS, EXPERTS, SEGMENTS), SEGMENTS)
    return run(x_SxTxD, experts, r_SxE)


def _blocks_fwd(
    x_SxTxD: Array, experts: Experts, r_SxE: Array
) -> tuple[Array, tuple[Array, Experts, Array]]:
    return blocks_ffn(x_SxTxD, experts, r_SxE), (x_SxTxD, experts, r_SxE)


def _blocks_bwd(
    saved: tuple[Array, Experts, Array], dy_SxTxD: Array
) -> tuple[Array, dict[str, Array], Array]:
    run = _on_mesh(
        _backward, (SEGMENTS, EXPERTS, SEGMENTS, SEGMENTS), (SEGMENTS, EXPERTS, SEGMENTS)
    )
    return run(*saved, dy_SxTxD)


blocks_ffn.defvjp(_blocks_fwd, _blocks_bwd)


def _on_mesh(function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """`function` on this device's part of everything; without a mesh, on everything."""
    if jax.sharding.get_abstract_mesh().empty:
        return functools.partial(function, on_mesh=False)
    return jax.shard_map(
        functools.partial(function, on_mesh=True),
        in_specs=in_specs,
        out_specs=out_specs,
        check_vma=False,
    )


def _forward(x_SxTxD: Array, experts: Experts, r_SxE: Array, *, on_mesh: bool) -> Array:
    def add_block(y_SxTxD: Array, start: Array, size: int) -> Array:
        merged = merge_experts(_block(experts, start, size, x_SxTxD, on_mesh), r_SxE)
        with jax.named_scope("expert_ffn"):
            gate_SxTxb, up_SxTxb, _ = _gate_and_up(x_SxTxD, merged)
            hidden_SxTxb = (gate_SxTxb * up_SxTxb).astype(x_SxTxD.dtype)
            return y_SxTxD + jnp.matmul(hidden_SxTxb, merged["down"])

    y_SxTxD = _over_blocks(add_block, jnp.zeros(x_SxTxD.shape, jnp.float32), experts, x_SxTxD)
    if on_mesh:
        y_SxTxD = jax.lax.psum(y_SxTxD.astype(x_SxTxD.dtype), TENSOR)
    return y_SxTxD.astype(x_SxTxD.dtype)


def _backward(
    x_SxTxD: Array, experts: Experts, r_SxE: Array, dy_SxTxD: Array, *, on_mesh: bool
) -> tuple[Array, dict[str, Array], Array]:
    dtype = x_SxTxD.dtype

    def add_block(sums: Any, start: Array, size: int) -> Any:
        dx_SxTxD, dexperts, dr_SxE = sums
        block = _block(experts, start, size, x_SxTxD, on_mesh)
        merged = merge_experts(block, r_SxE)
        with jax.named_scope("expert_ffn"):
            act_SxTxb, up_SxTxb, dact_SxTxb = _gate_and_up(x_SxTxD, merged)
            hidden_SxTxb = (act_SxTxb * up_SxTxb).astype(dtype)
            dhidden_SxTxb = jnp.matmul(dy_SxTxD, merged["down"].mT)
            dup_SxTxb = (dhidden_SxTxb * act_SxTxb).astype(dtype)
            dgate_SxTxb = (dhidden_SxTxb * up_SxTxb * dact_SxTxb).astype(dtype)
            dx_SxTxD += jnp.matmul(dgate_SxTxb, merged["gate"].mT)
            dx_SxTxD += jnp.matmul(dup_SxTxb, merged["up"].mT)
            dmerged = {
                "gate": jnp.matmul(x_SxTxD.mT, dgate_SxTxb),
                "up": jnp.matmul(x_SxTxD.mT, dup_SxTxb),
                "down": jnp.matmul(hidden_SxTxb.mT, dy_SxTxD),
            }
        with jax.named_scope("merge"):
            for name, dm_SxMxN in dmerged.items():
                dr_SxE += jnp.einsum(
                    "smn,emn->se", dm_SxMxN, block[name], preferred_element_type=jnp.float32
                )
                # In float32 on both sides: the sum over segments is a gradient's.
                dw_ExMxN = jnp.einsum("se,smn->emn", r_SxE, dm_SxMxN.astype(jnp.float32))
                if on_mesh:
                    dw_ExMxN = jax.lax.psum_scatter(
                        dw_ExMxN, FSDP, scatter_dimension=D_AXIS[name], tiled=True
                    )
                dexperts[name] = jax.lax.dynamic_update_slice_in_dim(
                    dexperts[name], dw_ExMxN, start, axis=F_AXIS[name]
                )
        return dx_SxTxD, dexperts, dr_SxE

    zeros = (
        jnp.zeros(x_SxTxD.shape, jnp.float32),
        {name: jnp.zeros(w.shape, jnp.float32) for name, w in experts.items()},
        jnp.zeros(r_SxE.shape, jnp.float32),
    )
    dx_SxTxD, dexperts, dr_SxE = _over_blocks(add_block, zeros, experts, x_SxTxD)
    if on_mesh:
        dx_SxTxD = jax.lax.psum(dx_SxTxD.astype(dtype), TENSOR)
        dexperts = jax.lax.psum(dexperts, REPLICAS)
        dr_SxE = jax.lax.psum(dr_SxE, TENSOR)
    dexperts = {name: dw.astype(experts[name].dtype) for name, dw in dexperts.items()}
    return dx_SxTxD.astype(dtype), dexperts, dr_SxE.astype(r_SxE.dtype)


def _gate_and_up(x_SxTxD: Array, merged: Experts) -> tuple[Array, Array, Array]:
    """silu(gate), up, and silu'(gate), float32 `[S, T, b]`."""
    gate_SxTxb = jnp.matmul(x_SxTxD, merged["gate"]).astype(jnp.float32)
    up_SxTxb = jnp.matmul(x_SxTxD, merged["up"]).astype(jnp.float32)
    sigmoid_SxTxb = jax.nn.sigmoid(gate_SxTxb)
    act_SxTxb = gate_SxTxb * sigmoid_SxTxb
    return act_SxTxb, up_SxTxb, sigmoid_SxTxb + act_SxTxb * (1 - sigmoid_SxTxb)


def _block(
    experts: Experts, start: Array, size: int, like: Array, on_mesh: bool
) -> dict[str, Array]:
    """A block of every expert, in the compute type and whole in D."""
    block = {
        name: jax.lax.dynamic_slice_in_dim(w, start, size, axis=F_AXIS[name])
        for name, w in experts.items()
    }
    block = _cast(block, like)
    if on_mesh:
        block = {
            name: jax.lax.all_gather(w, FSDP, axis=D_AXIS[name], tiled=True)
            for name, w in block.items()
        }
    return block


def block_size(S: int, D: int, F: int, itemsize: int) -> int:
    """Columns of F per block, so that three merged blocks of all S segments fit `MERGED_BYTES`."""
    columns = MERGED_BYTES // (3 * S * D * itemsize)
    if columns >= F:
        return F
    return max(BLOCK_MULTIPLE, columns // BLOCK_MULTIPLE * BLOCK_MULTIPLE)


def _over_blocks(
    add_block: Callable[[Any, Array, int], Any], sums: Any, experts: Experts, x_SxTxD: Array
) -> Any:
    """Adds up all blocks of F: a loop over the whole ones, and what remains."""
    S, _, D = x_SxTxD.shape
    F = experts["gate"].shape[2]
    size = min(F, block_size(S, D, F, x_SxTxD.dtype.itemsize))
    whole, rest = divmod(F, size)
    if whole == 1:
        sums = add_block(sums, jnp.int32(0), size)
    else:
        sums = jax.lax.fori_loop(0, whole, lambda i, s: add_block(s, i * size, size), sums)
    return add_block(sums, jnp.int32(whole * size), rest) if rest else sums
