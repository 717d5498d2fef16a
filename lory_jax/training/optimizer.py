"""AdamW with linear warm-up and cosine decay (paper, section 4.1)."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

# Every parameter by the last part of its name: whether weight decay applies to it.
IS_DECAYED = {
    "embedding": True,
    "head": True,
    "query": True,
    "key": True,
    "value": True,
    "output": True,
    "gate": True,
    "up": True,
    "down": True,
    "router": True,
    "attention_norm": False,
    "ffn_norm": False,
    "final_norm": False,
}


def decay_mask(params: Any) -> Any:
    """True where weight decay applies; a parameter the table does not name raises `KeyError`."""
    return jax.tree_util.tree_map_with_path(lambda path, _: IS_DECAYED[path[-1].key], params)


def make_optimizer(
    beta1: float,
    beta2: float,
    epsilon: float,
    weight_decay: float,
    first_moment_dtype: str = "float32",
) -> optax.GradientTransformation:
    """AdamW without its learning rate and clipping, which the step applies where all can see.

    The second moment stays float32: with beta2 = 0.95 its changes are below bfloat16's precision.
    """
    return optax.chain(
        optax.scale_by_adam(b1=beta1, b2=beta2, eps=epsilon, mu_dtype=first_moment_dtype),
        optax.add_decayed_weights(weight_decay, mask=decay_mask),
    )


def learning_rate(
    step: Array, *, steps: int, peak: float, warmup_fraction: float, final_fraction: float
) -> Array:
    """Rate of the update that follows `step` completed ones: linear to `peak`, then cosine."""
    warmup_steps = max(1, round(warmup_fraction * steps))
    warm = (step + 1) / warmup_steps
    progress = jnp.clip((step - warmup_steps) / max(1, steps - warmup_steps), 0.0, 1.0)
    cosine = final_fraction + (1 - final_fraction) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
    return peak * jnp.where(step < warmup_steps, warm, cosine)


def clip_by_norm(gradients: Any, norm: Array, clip_norm: float) -> Any:
    """Scales gradients whose global norm is above `clip_norm` down to it; 0 turns it off."""
    if not clip_norm:
        return gradients
    scale = jnp.minimum(1.0, clip_norm / jnp.maximum(norm, 1e-16))
    return jax.tree.map(lambda g: g * scale, gradients)
