"""The same trained model under other routings: fewer experts, another first segment.

Letters: N instances, L sequence, T tokens per segment.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from lory_jax.errors import InputError
from lory_jax.evaluation.measure import Run, as_trained, losses, perplexity


def check_variants(run: Run, counts: Sequence[int], leakage: bool) -> None:
    """Raises `InputError` unless the model has as many experts as any of `counts`, or any to leak.

    Called before anything long starts.
    """
    for k in counts:
        run.model.with_top_k_experts(k)
    config = run.model.config
    if leakage and (not config.num_experts or config.is_sparse):
        raise InputError(
            f"--leakage: {run.workdir} is a dense model, which routes nothing, or a sparse one"
        )


def top_k_perplexity(
    run: Run, sets: dict[str, np.ndarray], counts: Sequence[int], routing: str | None
) -> dict[str, dict[str, float]]:
    """`{k: {domain: perplexity}}` over positions >= T, merging only the k largest experts."""
    T = run.model.config.segment_length
    found = {}
    for k in counts:
        some = losses(
            run.replace(top_k_experts=k), sets, f"evaluating, top {k}", routing or as_trained(run)
        )
        found[str(k)] = {domain: perplexity(nll_NxL[:, T:]) for domain, nll_NxL in some.items()}
    return found


def leakage(run: Run, sets: dict[str, np.ndarray]) -> dict[str, Any]:
    """What segment 1 gains by seeing its own mean, the leak of routing by `self`.

    Returns:
      `perplexity`, by domain: over `all_positions_self` and `all_positions_uniform`, where the
      first segment is routed by its own mean or gets 1/E for every expert, and over
      `positions_from_T`, routed as in training;
      `loss_by_position`: mean nats at every position, `self` and `uniform`, all instances alike.
    """
    by_first = {
        first: losses(run.replace(first_segment_routing=first), sets, f"evaluating, {first}", None)
        for first in ("self", "uniform")
    }
    T = run.model.config.segment_length
    mine = by_first[run.model.config.first_segment_routing]
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


def table(title: str, rows: dict[str, dict[str, float]]) -> str:
    """One line per variant, one column per domain."""
    domains = list(next(iter(rows.values())))
    width = max(len(name) for name in [*rows, title])
    columns = [max(len(domain), 10) for domain in domains]
    heads = "".join(f"  {d:>{c}}" for d, c in zip(domains, columns, strict=True))
    lines = [f"{title:{width}}{heads}"]
    for name, row in rows.items():
        cells = "".join(f"  {row[d]:{c}.3f}" for d, c in zip(domains, columns, strict=True))
        lines.append(f"{name:{width}}{cells}")
    return "\n".join(lines)
