"""AdamW with linear warm-up and cosine decay (paper, section 4.1)."""

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
    **{f"{name}_{factor}": True for name in ("gate", "up", "down") for factor in "ab"},
    "router": True,
    "choice_bias": False,
    "l1_weight": False,
    "threshold": False,
    "threshold_updates": False,
    "attention_norm": False,
    "ffn_norm": False,
    "final_norm": False,
    "query_bias": False,
    "key_bias": False,
    "value_bias": False,
    "output_bias": False,
    "gate_bias": False,
    "up_bias": False,
    "down_bias": False,
}


def decay_mask(params: Any) -> Any:
    """True where weight decay applies; `KeyError` for a parameter that the table does not name."""
    return jax.tree_util.tree_map_with_path(lambda path, _: IS_DECAYED[path[-1].key], params)


@dataclass(frozen=True)
class Optimizer:
    """Gradient clipping, AdamW and the learning rate, all from optax.

    They are not one `optax.chain`, for two reasons. The learning rate is a function of the run's
    step, which also counts skipped steps, so it needs no counter of its own. And the stored state
    is that of `adamw` alone, as in checkpoints of every earlier version.

    Attributes:
      clip: clips the global norm of the gradients; it has no state.
      adamw: AdamW before its learning rate.
      schedule: the learning rate of the next update, by the number of completed steps.
    """

    clip: optax.GradientTransformation
    adamw: optax.GradientTransformation
    schedule: optax.Schedule

    def init(self, params: Any) -> Any:
        """Returns the state before the first step."""
        return self.adamw.init(params)

    def update(self, gradients: Any, opt_state: Any, params: Any, step: Array) -> tuple[Any, Any]:
        """Returns what to add to the parameters after `step` completed steps, and the new state."""
        clipped, _ = self.clip.update(gradients, optax.EmptyState())
        updates, opt_state = self.adamw.update(clipped, opt_state, params)
        return optax.tree.scale(-self.schedule(step), updates), opt_state


def make_optimizer(train_config: Mapping[str, Any], dense_steps: int = 0) -> Optimizer:
    """The optimiser of the section `config.train`, for a run that is upcycled after `dense_steps`.

    The second moment stays float32: with beta2 = 0.95 its changes are below bfloat16's precision.
    """
    clip_norm = train_config["clip_norm"]
    return Optimizer(
        clip=optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity(),
        adamw=optax.chain(
            optax.scale_by_adam(
                b1=train_config["beta1"],
                b2=train_config["beta2"],
                eps=train_config["epsilon"],
                mu_dtype=train_config["first_moment_dtype"],
            ),
            optax.add_decayed_weights(train_config["weight_decay"], mask=decay_mask),
        ),
        schedule=make_schedule(train_config, dense_steps),
    )


def make_schedule(train_config: Mapping[str, Any], dense_steps: int = 0) -> optax.Schedule:
    """Linear warm-up to the peak, then cosine decay to its final fraction.

    With `upcycle_rewarm_fraction` and a dense phase, the rate is warmed up once more when the
    experts begin: by then it may be at its peak, while the router and redrawn entries are new.
    """
    steps, peak = train_config["steps"], train_config["learning_rate"]
    warmup_steps = max(1, round(train_config["warmup_fraction"] * steps))
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=peak / warmup_steps,  # from 0, the first update would do nothing
        peak_value=peak,
        warmup_steps=warmup_steps,
        decay_steps=max(steps, warmup_steps + 1),  # optax requires a decay step
        end_value=train_config["final_learning_rate_fraction"] * peak,
    )
    rewarm_steps = round(train_config["upcycle_rewarm_fraction"] * steps)
    if not dense_steps or not rewarm_steps:
        return schedule

    def rewarmed(step: Array) -> Array:
        since = (step - dense_steps + 1) / rewarm_steps
        return schedule(step) * jnp.where(step < dense_steps, 1.0, jnp.minimum(since, 1.0))

    return rewarmed
