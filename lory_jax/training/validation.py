"""Validation inside the training loop."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jax.sharding import Mesh

from lory_jax.console import say
from lory_jax.evaluation.perplexity import losses_of_tokens
from lory_jax.model.transformer import Params
from lory_jax.training.phases import Phase


def validation_losses(
    phase: Phase, params: Params, sets: Mapping[str, np.ndarray], mesh: Mesh
) -> dict[str, Any]:
    """Loss in nats per token over positions >= T: for each domain, and the mean over domains.

    Nothing without sets: there is no loss then, rather than one that is NaN.
    """
    if not sets:
        return {}
    T = phase.model_config.segment_length
    losses = {}
    for domain, instances in sets.items():
        nll = losses_of_tokens(
            phase.loss_step,
            params,
            instances,
            phase.batch_size,
            mesh,
            phase.model_config.batch_axis,
        )
        losses[domain] = float(nll[:, T:].mean(dtype=np.float64))
    mean = float(np.mean(list(losses.values())))
    return {"validation_loss": mean, "validation_loss_by_domain": losses}


def sets_to_validate(
    sets: Mapping[str, np.ndarray], largest: int, segment_length: int
) -> dict[str, np.ndarray]:
    """The first `largest` instances of every domain that has any; says so if nothing is left."""
    filled = {domain: rows[:largest] for domain, rows in sets.items() if len(rows)}
    if not filled:
        say("no validation_loss: the prepared data hold no validation instance")
    elif all(rows.shape[1] - 1 <= segment_length for rows in filled.values()):
        say("no validation_loss: instances are one segment long, and positions >= T are measured")
        return {}
    return filled
