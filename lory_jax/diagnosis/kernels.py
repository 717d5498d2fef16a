"""Each kernel of this platform against its reference: how large the error is.

Letters: B batch, L sequence, D model, F FFN, E experts, S segments of the batch, V vocabulary.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import Mesh

from lory_jax.model.attention import Attention, attend
from lory_jax.model.config import ModelConfig
from lory_jax.model.merged_ffn import merged_ffn
from lory_jax.model.parameters import Initializer
from lory_jax.parallel import replicated
from lory_jax.training.loss import mean_loss

MAX_LENGTH = 1024  # the reference of attention holds all L x L scores
LIMITS = {"float32": 1e-4, "bfloat16": 5e-2}  # the largest error that passes, by compute dtype


def largest_error(
    kernel: Callable[..., Array],
    reference: Callable[..., Array],
    inputs: Callable[[Array], tuple[Any, ...]],
    dtype: str,
    mesh: Mesh,
) -> float:
    """The largest error in a kernel's value and gradients, relative to the reference's maximum.

    Args:
      kernel: the function to check. It gets its arguments in `dtype`.
      reference: the same function in plain JAX. It gets its arguments in float32.
      inputs: makes the float32 arguments from a random key.
      dtype: the compute dtype of the kernel.
      mesh: the devices to run on.
    """

    def run(key: Array) -> Array:
        exact = inputs(key)
        rounded = jax.tree.map(lambda x: x.astype(dtype), exact)
        found, pull = jax.vjp(kernel, *rounded)
        with jax.default_matmul_precision("highest"):
            expected, pull_reference = jax.vjp(reference, *exact)
            cotangent = jax.random.normal(jax.random.fold_in(key, 1), expected.shape)
            gradients_expected = pull_reference(cotangent)
        gradients = pull(cotangent.astype(found.dtype))
        errors = [
            jnp.max(jnp.abs(a.astype(jnp.float32) - b)) / jnp.max(jnp.abs(b))
            for a, b in zip(
                jax.tree.leaves((found, gradients)),
                jax.tree.leaves((expected, gradients_expected)),
                strict=True,
            )
        ]
        return jnp.max(jnp.stack(errors))

    return float(jax.jit(run, out_shardings=replicated(mesh))(jax.random.key(0)))


def attention_error(model_config: ModelConfig, mesh: Mesh) -> float:
    """Compares a layer's attention, rotation and projections included, with the whole matrix of
    scores."""
    L, D = min(model_config.sequence_length, MAX_LENGTH), model_config.embed_dim
    rope = model_config.rope

    def layer(key: Array) -> Attention:
        sizes = (D, model_config.num_heads, model_config.kv_heads, model_config.head_width)
        return Attention(Initializer(key), *sizes, 1.0, model_config.attention_bias)

    graph = nnx.split(nnx.eval_shape(functools.partial(layer, jax.random.key(0))))[0]

    def kernel(x_BxLxD: Array, params: Any) -> Array:
        return nnx.merge(graph, params)(x_BxLxD, rope, model_config.attention)

    def whole(x_BxLxD: Array, params: Any) -> Array:
        attention = nnx.merge(graph, params)
        positions_BxL = jnp.broadcast_to(jnp.arange(L), x_BxLxD.shape[:2])
        arrays = attention.project(x_BxLxD, positions_BxL, rope)
        query, key, value = (x.swapaxes(1, 2) for x in arrays)
        values_BxHxLxK = attend(query, key, value, jnp.tril(jnp.ones((L, L), bool)))
        return attention.combine(values_BxHxLxK.swapaxes(1, 2))

    def inputs(key: Array) -> tuple[Any, ...]:
        of_x, of_params = jax.random.split(key)
        params = nnx.to_pure_dict(nnx.state(layer(of_params)))
        return jax.random.normal(of_x, (mesh.size, L, D)), params

    return largest_error(kernel, whole, inputs, model_config.compute_dtype, mesh)


def merged_ffn_error(model_config: ModelConfig, mesh: Mesh) -> float:
    """Compares the merged FFN of this platform with the plain einsum."""
    D, F, E = model_config.embed_dim, model_config.mlp_dim, model_config.num_experts
    S = 2 * mesh.size

    def inputs(key: Array) -> tuple[Any, ...]:
        x, gate, up, down, r = jax.random.split(key, 5)
        experts = {
            "gate": jax.random.normal(gate, (E, D, F)) / math.sqrt(D),
            "up": jax.random.normal(up, (E, D, F)) / math.sqrt(D),
            "down": jax.random.normal(down, (E, F, D)) / math.sqrt(F),
        }
        r_SxE = jax.nn.softmax(jax.random.normal(r, (S, E)))
        return jax.random.normal(x, (S, model_config.segment_length, D)), experts, r_SxE

    kernel = functools.partial(merged_ffn, implementation=model_config.merged_ffn)
    reference = functools.partial(merged_ffn, implementation="einsum")
    return largest_error(kernel, reference, inputs, model_config.compute_dtype, mesh)


def loss_error(model_config: ModelConfig, mesh: Mesh) -> float:
    """Compares the cross-entropy computed in chunks with that of all logits at once."""
    B, L = mesh.size, min(model_config.sequence_length, MAX_LENGTH)
    D, V = model_config.embed_dim, model_config.vocab_size
    targets_BxL = np.random.default_rng(1).integers(0, V, (B, L), np.int32)

    def whole(x_BxLxD: Array, head_DxV: Array) -> Array:
        log_p_BxLxV = jax.nn.log_softmax(jnp.matmul(x_BxLxD, head_DxV))
        return -jnp.mean(
            jnp.take_along_axis(log_p_BxLxV, jnp.asarray(targets_BxL)[..., None], axis=-1)
        )

    def inputs(key: Array) -> tuple[Array, ...]:
        x, head = jax.random.split(key)
        return (
            jax.random.normal(x, (B, L, D)),
            1 / math.sqrt(D) * jax.random.normal(head, (D, V)),
        )

    def chunks(x_BxLxD: Array, head_DxV: Array) -> Array:
        return mean_loss(x_BxLxD, head_DxV, jnp.asarray(targets_BxL))

    return largest_error(chunks, whole, inputs, model_config.compute_dtype, mesh)
