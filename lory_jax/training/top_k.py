"""How many experts a merge keeps while a model is trained to do with few (paper, section 6).

The number falls linearly from E to `config.model.top_k_experts` between two shares of the steps, so
that the routers and experts follow. It is a real number: the last expert that is kept fades out
(`keep_about` in model/routing.py).
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from jax import Array

from lory_jax.model.config import ModelConfig

Schedule = Callable[[Array], Array]


def top_k_schedule(model_config: ModelConfig, train_config: Mapping[str, Any]) -> Schedule | None:
    """Experts kept in the step after so many completed ones; None where all are always kept.

    Args:
      model_config: the model; a dense one keeps none.
      train_config: the section `config.train`.
    """
    E, k = model_config.num_experts, model_config.top_k_experts
    if not 0 < k < E:
        return None
    steps = train_config["steps"]
    start = round(train_config["top_k_anneal_start"] * steps)
    length = max(1, round(train_config["top_k_anneal_end"] * steps) - start)

    def kept(step: Array) -> Array:
        share = jnp.clip((step - start) / length, 0.0, 1.0)
        return E - (E - k) * share

    return kept
