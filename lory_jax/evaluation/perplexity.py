"""Perplexity and bits per byte of held-out instances (paper, section 4.1).

Letters: N instances, L sequence, V vocabulary.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from lory_jax.parallel import place_batch


def losses_of_tokens(
    loss_step: Callable[[Any, jax.Array], jax.Array],
    params: Any,
    instances_NxL1: np.ndarray,
    batch_size: int,
    mesh: Mesh,
    batch_axis: str = "batch",
) -> np.ndarray:
    """Negative log-likelihood in nats of every target token, float32 `[N, L]`.

    Args:
      loss_step: made by `training.step.make_loss_step`.
      params: the parameters.
      instances_NxL1: the instances.
      batch_size: instances at a time, over all processes.
      mesh: where they are placed.
      batch_axis: the logical axis of the batch, `ModelConfig.batch_axis`.
    """
    local = batch_size // jax.process_count()
    offset = jax.process_index() * local
    losses = []
    for start in range(0, len(instances_NxL1), batch_size):
        rows = np.arange(start, start + batch_size)
        # The last batch is padded with the last instance, so that a single shape is compiled.
        batch = instances_NxL1[np.minimum(rows, len(instances_NxL1) - 1)]
        rows = batch[offset : offset + local]
        nll_BxL = loss_step(params, place_batch(rows, mesh, batch_axis))
        losses.append(nll_BxL)
    return np.concatenate(jax.device_get(losses))[: len(instances_NxL1)]


def summarize(
    nll_NxL: np.ndarray,
    instances_NxL1: np.ndarray,
    token_bytes_V: np.ndarray,
    first_position: int,
) -> dict[str, float]:
    """Perplexity from a position on (T is leak-free), over all positions, and bits per byte.

    Position p reads token p and predicts token p + 1. In segment 1 (p < T) the routing weights come
    from the segment's own mean, so later tokens leak slightly into these predictions.
    """
    scored_NxL = nll_NxL[:, first_position:]
    targets_NxL = instances_NxL1[:, 1 + first_position :]
    scored_bytes = int(token_bytes_V[targets_NxL].sum())
    return {
        "perplexity": perplexity(scored_NxL),
        "perplexity_all_positions": perplexity(nll_NxL),
        "bits_per_byte": float(np.sum(scored_NxL, dtype=np.float64) / np.log(2) / scored_bytes),
    }


def instance_losses(nll_NxL: np.ndarray, first_position: int) -> np.ndarray:
    """The mean loss of every instance from a position on, float32 `[N]`."""
    mean_N = np.mean(nll_NxL[:, first_position:], axis=1, dtype=np.float64)
    return np.asarray(mean_N, np.float32)


def perplexity(nll: np.ndarray) -> float:
    """exp of the mean loss."""
    return float(np.exp(np.mean(nll, dtype=np.float64)))


def standard_error(
    nll_NxL: np.ndarray, first_position: int, origins: Sequence[str] | None = None
) -> float | None:
    """Standard error of the perplexity from a position on, from the spread between origins.

    Instances of one origin resemble each other, so it is origins that are counted as independent
    samples, of as many instances each as they have. Without `origins`, every instance is one. To
    first order, the standard error of exp(mean) is exp(mean) times that of the mean. None for a
    single sample.
    """
    mean_N = np.mean(nll_NxL[:, first_position:], axis=1, dtype=np.float64)
    samples = np.arange(len(nll_NxL))
    if origins is not None:
        samples = np.unique(np.asarray(origins), return_inverse=True)[1]
    count = int(samples.max(initial=-1)) + 1
    if count < 2:
        return None
    deviations = np.bincount(samples, weights=mean_N - np.mean(mean_N))
    variance = count / (count - 1) * np.sum(deviations**2) / len(nll_NxL) ** 2
    return math.exp(float(np.mean(mean_N))) * math.sqrt(variance)
