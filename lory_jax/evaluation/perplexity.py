"""Perplexity and bits per byte of held-out instances (paper, section 4.1).

Letters: N instances, L sequence, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from lory_jax.parallel import place_batch


def token_losses(
    loss_step: Callable[[Any, jax.Array], jax.Array],
    params: Any,
    instances_NxL1: np.ndarray,
    batch_size: int,
    mesh: Mesh,
    batch_axis: str = "batch",
) -> np.ndarray:
    """Negative log-likelihood in nats of every target token, float32 `[N, L]`.

    `loss_step` is `training.step.make_loss_step`'s; `batch_size` is over all processes, and
    `batch_axis` the model's.
    """
    local = batch_size // jax.process_count()
    offset = jax.process_index() * local
    losses = []
    for start in range(0, len(instances_NxL1), batch_size):
        rows = np.arange(start, start + batch_size)
        # The last batch is filled up with the last instance, so that one shape is compiled.
        batch = instances_NxL1[np.minimum(rows, len(instances_NxL1) - 1)]
        rows = batch[offset : offset + local]
        nll_BxL = loss_step(params, place_batch(rows, mesh, batch_axis))
        losses.append(nll_BxL)
    return np.concatenate(jax.device_get(losses))[: len(instances_NxL1)]


def summarize(
    nll_NxL: np.ndarray,
    instances_NxL1: np.ndarray,
    token_bytes_V: np.ndarray,
    segment_length: int,
) -> dict[str, float]:
    """Perplexity over positions >= T (leak-free), over all positions, and bits per byte (>= T).

    Position p reads token p and predicts token p + 1. In segment 1 (p < T) the routing weights come
    from the segment's own mean, so its predictions have seen a little of their future.
    """
    scored_NxL = nll_NxL[:, segment_length:]
    targets_NxL = instances_NxL1[:, 1 + segment_length :]
    scored_bytes = int(token_bytes_V[targets_NxL].sum())
    return {
        "perplexity": float(np.exp(np.mean(scored_NxL, dtype=np.float64))),
        "perplexity_all_positions": float(np.exp(np.mean(nll_NxL, dtype=np.float64))),
        "bits_per_byte": float(np.sum(scored_NxL, dtype=np.float64) / np.log(2) / scored_bytes),
    }
