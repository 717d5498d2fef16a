"""Cross-entropy that never holds the logits of a whole batch.

The logits of one chunk of positions at a time are computed, used and discarded. In training their
gradient is taken in the same pass: what is kept for the backward pass is the gradient with respect
to the hidden states and the head, not the logits, and no matrix product is done twice.

Under a mesh this runs inside `shard_map`: the head is gathered over `fsdp` once, each device holds
its slice of the vocabulary, and what travels over `tensor` is one number per position (the
log-normaliser) and the hidden states' gradient.

Letters: B batch, L sequence, D model, V vocabulary, c positions of one chunk.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from lory_jax.parallel import RULES, has_mesh, on_mesh, partition_spec

LOGITS_BYTES = 256 * 2**20  # float32 logits held at once, per device

BATCH = partition_spec(("moe_batch",))
HEAD = partition_spec(("embed", "vocab"))
(FSDP,), (TENSOR,) = RULES["embed"], RULES["vocab"]
BATCH_AXES = RULES["moe_batch"]


def token_losses(x_BxLxD: Array, head_DxV: Array, targets_BxL: Array) -> Array:
    """Negative log-likelihood of every target in nats, float32 `[B, L]`.

    Args:
      x_BxLxD: what the head reads (after the final norm), in the compute type.
      head_DxV: the output head.
      targets_BxL: token ids.
    """
    run = on_mesh(_losses, (BATCH, HEAD, BATCH), BATCH)
    return run(x_BxLxD, head_DxV, targets_BxL)


@jax.custom_vjp
def mean_loss(x_BxLxD: Array, head_DxV: Array, targets_BxL: Array) -> Array:
    """The mean of `token_losses`, a float32 scalar, differentiable in `x` and `head`."""
    return jnp.mean(token_losses(x_BxLxD, head_DxV, targets_BxL))


def _mean_loss_fwd(
    x_BxLxD: Array, head_DxV: Array, targets_BxL: Array
) -> tuple[Array, tuple[Array, Array]]:
    run = on_mesh(_losses_and_gradients, (BATCH, HEAD, BATCH), (BATCH, BATCH, HEAD))
    nll_BxL, dx_BxLxD, dhead_DxV = run(x_BxLxD, head_DxV, targets_BxL)
    return jnp.mean(nll_BxL), (dx_BxLxD, dhead_DxV)


def _mean_loss_bwd(saved: tuple[Array, Array], dloss: Array) -> tuple[Array, Array, None]:
    dx_BxLxD, dhead_DxV = saved
    scale = dloss / math.prod(dx_BxLxD.shape[:2])
    return (dx_BxLxD * scale).astype(dx_BxLxD.dtype), dhead_DxV * scale, None


mean_loss.defvjp(_mean_loss_fwd, _mean_loss_bwd)


def _losses(x_BxLxD: Array, head_DxV: Array, targets_BxL: Array) -> Array:
    head_DxV = _whole_head(head_DxV, x_BxLxD)

    def of_chunk(_: None, chunk: tuple[Array, Array]) -> tuple[None, Array]:
        return None, _chunk(*chunk, head_DxV)[0]

    _, losses = jax.lax.scan(of_chunk, None, _chunks(x_BxLxD, targets_BxL, head_DxV))
    return _unchunk(losses)[:, : x_BxLxD.shape[1]]


def _losses_and_gradients(
    x_BxLxD: Array, head_DxV: Array, targets_BxL: Array
) -> tuple[Array, Array, Array]:
    """Losses, and the gradients of their sum."""
    L, dtype = x_BxLxD.shape[1], x_BxLxD.dtype
    whole_DxV = _whole_head(head_DxV, x_BxLxD)

    def of_chunk(dhead_DxV: Array, chunk: tuple[Array, Array]) -> tuple[Array, Any]:
        x_BxcxD, targets_Bxc = chunk
        nll_Bxc, probability_BxcxV, is_target_BxcxV = _chunk(x_BxcxD, targets_Bxc, whole_DxV)
        is_valid_Bxcx1 = (targets_Bxc >= 0)[..., None]
        dlogits_BxcxV = jnp.where(is_valid_Bxcx1, probability_BxcxV - is_target_BxcxV, 0.0)
        dlogits_BxcxV = dlogits_BxcxV.astype(dtype)
        dx_BxcxD = jnp.einsum("bcv,dv->bcd", dlogits_BxcxV, whole_DxV)
        dhead_DxV += jnp.einsum("bcd,bcv->dv", x_BxcxD, dlogits_BxcxV).astype(jnp.float32)
        return dhead_DxV, (nll_Bxc, dx_BxcxD)

    zeros = jnp.zeros(whole_DxV.shape, jnp.float32)
    dhead_DxV, (nll, dx) = jax.lax.scan(of_chunk, zeros, _chunks(x_BxLxD, targets_BxL, whole_DxV))
    nll_BxL, dx_BxLxD = _unchunk(nll)[:, :L], _unchunk(dx)[:, :L]
    if has_mesh():
        dx_BxLxD = jax.lax.psum(dx_BxLxD, TENSOR)
        dhead_DxV = jax.lax.psum_scatter(dhead_DxV, FSDP, scatter_dimension=0, tiled=True)
        dhead_DxV = jax.lax.psum(dhead_DxV, [axis for axis in BATCH_AXES if axis != FSDP])
    return nll_BxL, dx_BxLxD, dhead_DxV


def _chunk(x_BxcxD: Array, targets_Bxc: Array, head_DxV: Array) -> tuple[Array, Array, Array]:
    """Losses of a chunk; for this device's slice of the vocabulary, probabilities and targets."""
    with jax.named_scope("head"):
        logits_BxcxV = jnp.einsum("bcd,dv->bcv", x_BxcxD, head_DxV).astype(jnp.float32)
    with jax.named_scope("loss"):
        V = head_DxV.shape[1]
        first = jax.lax.axis_index(TENSOR) * V if has_mesh() else 0
        is_target_BxcxV = targets_Bxc[..., None] - first == jnp.arange(V)[None, None]
        greatest_Bxcx1 = jnp.max(logits_BxcxV, axis=-1, keepdims=True)
        if has_mesh():
            greatest_Bxcx1 = jax.lax.pmax(greatest_Bxcx1, TENSOR)
        exp_BxcxV = jnp.exp(logits_BxcxV - greatest_Bxcx1)
        total_Bxcx1 = jnp.sum(exp_BxcxV, axis=-1, keepdims=True)
        target_Bxc = jnp.sum(jnp.where(is_target_BxcxV, logits_BxcxV, 0.0), axis=-1)
        if has_mesh():
            total_Bxcx1, target_Bxc = jax.lax.psum((total_Bxcx1, target_Bxc), TENSOR)
        nll_Bxc = jnp.log(total_Bxcx1[..., 0]) + greatest_Bxcx1[..., 0] - target_Bxc
    return nll_Bxc, exp_BxcxV / total_Bxcx1, is_target_BxcxV


def _whole_head(head_DxV: Array, like: Array) -> Array:
    head_DxV = head_DxV.astype(like.dtype)
    return jax.lax.all_gather(head_DxV, FSDP, axis=0, tiled=True) if has_mesh() else head_DxV


def _chunks(x_BxLxD: Array, targets_BxL: Array, head_DxV: Array) -> tuple[Array, Array]:
    """`[n, B, c, D]` and `[n, B, c]`: as few chunks as fit; the last is filled with target -1."""
    B, L, D = x_BxLxD.shape
    n = max(1, min(L, -(-4 * B * L * head_DxV.shape[1] // LOGITS_BYTES)))
    c = -(-L // n)
    n = -(-L // c)
    padding = n * c - L
    x_BxLxD = jnp.pad(x_BxLxD, ((0, 0), (0, padding), (0, 0)))
    targets_BxL = jnp.pad(targets_BxL, ((0, 0), (0, padding)), constant_values=-1)
    x_nxBxcxD = x_BxLxD.reshape(B, n, c, D).swapaxes(0, 1)
    return x_nxBxcxD, targets_BxL.reshape(B, n, c).swapaxes(0, 1)


def _unchunk(y: Array) -> Array:
    """`[n, B, c, ...]` to `[B, n * c, ...]`."""
    y = y.swapaxes(0, 1)
    return y.reshape(y.shape[0], -1, *y.shape[3:])
