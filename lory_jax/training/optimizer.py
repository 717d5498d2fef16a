"""AdamW with linear warm-up and cosine decay (paper, section 4.1)."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Optimizer:
    """Clipping, AdamW and its schedule.

    The learning rate is a function of the run's step, which moves on over skipped steps too; it
    needs no count of its own. What is stored is the state of `adamw` alone.

    Attributes:
      adamw: AdamW without clipping and learning rate.
      schedule: the learning rate of the update that follows so many completed steps.
      clip_norm: largest global norm of the gradients; 0 for any.
    """

    adamw: optax.GradientTransformation
    schedule: optax.Schedule
    clip_norm: float

    def init(self, params: Any) -> Any:
        """The state before the first step."""
        return self.adamw.init(params)

    def update(self, gradients: Any, opt_state: Any, params: Any, step: Array) -> tuple[Any, Any]:
        """What to add to the parameters after `step` completed steps, and the new state."""
        gradients = clip_by_norm(gradients, optax.tree.norm(gradients), self.clip_norm)
        updates, opt_state = self.adamw.update(gradients, opt_state, params)
        return optax.tree.scale(-self.schedule(step), updates), opt_state


def make_optimizer(train_config: Mapping[str, Any]) -> Optimizer:
    """The optimiser of the section `config.train`.

    The second moment stays float32: with beta2 = 0.95 its changes are below bfloat16's precision.
    """
    adamw = optax.chain(
        optax.scale_by_adam(
            b1=train_config["beta1"],
            b2=train_config["beta2"],
            eps=train_config["epsilon"],
            mu_dtype=train_config["first_moment_dtype"],
        ),
        optax.add_decayed_weights(train_config["weight_decay"], mask=decay_mask),
    )
    schedule = functools.partial(
        learning_rate,
        steps=train_config["steps"],
        peak=train_config["learning_rate"],
        warmup_fraction=train_config["warmup_fraction"],
        final_fraction=train_config["final_learning_rate_fraction"],
    )
    return Optimizer(adamw, schedule, train_config["clip_norm"])


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
