"""A trained model under other routings: fewer experts, another routing of the first segment.

Letters: N instances, L sequence, T tokens per segment.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from lory_jax.errors import InputError
from lory_jax.evaluation.measure import EvaluatedModel, as_trained, losses
from lory_jax.evaluation.perplexity import instance_losses, perplexity


def check_variants(evaluated: EvaluatedModel, counts: Sequence[int], leakage: bool) -> None:
    """Raises `InputError` unless the model has the experts that these measurements require.

    `counts` are numbers of experts to merge. Call this before anything long starts.
    """
    for k in counts:
        evaluated.model.with_top_k_experts(k)
    config = evaluated.model.config
    if leakage and (not config.num_experts or config.is_sparse):
        raise InputError(
            f"leakage: {evaluated.run} is a dense model, which has no routing, or a sparse "
            "baseline; requires a run with experts that merge"
        )


def top_k_losses(
    evaluated: EvaluatedModel,
    sets: dict[str, np.ndarray],
    counts: Sequence[int],
    routing: str | None,
) -> dict[str, dict[str, np.ndarray]]:
    """`{k: {domain: loss_N}}`: the mean loss in nats of every instance over the positions that are
    scored, float32, merging only the k largest experts."""
    first = evaluated.first_position
    found = {}
    for k in counts:
        fewer = evaluated.replace(top_k_experts=k)
        by_domain = losses(fewer, sets, f"evaluating, top {k}", routing or as_trained(evaluated))
        found[str(k)] = {d: instance_losses(nll_NxL, first) for d, nll_NxL in by_domain.items()}
    return found


def leakage(evaluated: EvaluatedModel, sets: dict[str, np.ndarray]) -> dict[str, Any]:
    """How much routing segment 1 by its own mean (`self`) lowers the loss: the leakage.

    Returns:
      `perplexity` by domain: `all_positions_self` and `all_positions_uniform`, where the first
      segment is routed by its own mean or by 1/E for every expert, and `positions_from_T`, routed
      as in training;
      `loss_by_position`: mean loss in nats at every position over the instances of all domains,
      for `self` and `uniform`.
    """
    by_first = {
        first: losses(
            evaluated.replace(first_segment_routing=first), sets, f"evaluating, {first}", None
        )
        for first in ("self", "uniform")
    }
    T = evaluated.model.config.segment_length
    mine = by_first[evaluated.model.config.first_segment_routing]
    return {
        "perplexity": {
            "all_positions_self": _by_domain(by_first["self"]),
            "all_positions_uniform": _by_domain(by_first["uniform"]),
            "positions_from_T": {d: perplexity(nll_NxL[:, T:]) for d, nll_NxL in mine.items()},
        },
        "loss_by_position": {
            first: np.concatenate(list(found.values())).mean(axis=0, dtype=np.float64).tolist()
            for first, found in by_first.items()
        },
    }


def _by_domain(found: dict[str, np.ndarray]) -> dict[str, float]:
    return {domain: perplexity(nll_NxL) for domain, nll_NxL in found.items()}
