"""How routing differs between domains, against how much it differs within one (section 5.4).

Letters: I instances, L sequence, N segments, Y layers with experts, E experts.
"""

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lory_jax import api
from lory_jax.analysis.texts import telling_texts
from lory_jax.console import progress
from lory_jax.errors import InputError
from lory_jax.evaluation.held_out import batches_of
from lory_jax.run.directory import RunDirectory

ANALYSIS = "analysis.json"
HALVINGS = 100  # random halvings of a domain, over which its distance is averaged


def analyze_run(run: RunDirectory, data: Path | None = None, seed: int = 0) -> dict[str, Any]:
    """Routes the test set of a run's data, and returns what `analysis.json` holds.

    routing_weights: `{domain: [Y][E]}`, the mean weights of every layer.
    routing_distance: per layer, see `routing_distances`.
    telling_texts: see `lory_jax.analysis.texts.telling_texts`.
    utilisation: `step` and `experts_active` lists, and the number of `pairs` (layer, expert).

    Raises:
      InputError: the model is dense, or its instances have only one segment.
    """
    model = api.load(run.path, run.step)
    if not model.config.num_experts:
        raise InputError(f"{run}: a dense model, which has no routing; pass a run with experts")
    if model.config.sequence_length <= model.config.segment_length:
        raise InputError(f"{run}: instances have only one segment, so none is routed by another")
    sets = run.open_data(data).held_out_with_instances("test")
    by_segment = segment_weights(model, sets, run.train_config["global_batch_size"])
    weights = instance_weights(by_segment)
    return {
        "step": model.step,
        "checkpoint": run.step,
        "instances": {domain: len(rows) for domain, rows in sets.items()},
        "routing_weights": {d: w_YxIxE.mean(axis=1).tolist() for d, w_YxIxE in weights.items()},
        "routing_distance": [
            {**row, "layer": model.config.layer_numbers[row["layer"]]}
            for row in routing_distances(weights, seed)
        ],
        "telling_texts": telling_texts(by_segment, sets, model),
        "utilisation": expert_use(
            run.read_metrics(), len(model.config.layer_numbers) * model.config.num_experts
        ),
    }


def segment_weights(
    model: api.Model, sets: Mapping[str, np.ndarray], batch_size: int
) -> dict[str, np.ndarray]:
    """Routing weights of every segment of every instance: `{domain: [Y, I, N, E]}`."""
    batches = batches_of(dict(sets), batch_size)
    weights: dict[str, list[np.ndarray]] = {domain: [] for domain in sets}
    for domain, rows in progress(batches, len(batches), "routing", "batches"):
        # The last batch is padded with the last instance, so that one shape is compiled.
        filled = rows[np.minimum(np.arange(batch_size), len(rows) - 1)]
        weights[domain].append(model.routing_weights(filled[:, :-1])[:, : len(rows)])
    return {domain: np.concatenate(parts, axis=1) for domain, parts in weights.items()}


def instance_weights(by_segment: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Mean weights of every instance over its segments k > 1: `{domain: [Y, I, E]}`.

    Segment 1 is left out: it is routed by itself, the others by the segment before them.
    """
    return {
        domain: r_YxIxNxE[:, :, 1:].mean(axis=2, dtype=np.float64)
        for domain, r_YxIxNxE in by_segment.items()
    }


def expert_use(metrics: Sequence[Mapping[str, Any]], pairs: int) -> dict[str, Any]:
    """How many (layer, expert) pairs were active, step by step; dense steps are left out."""
    lines = [line for line in metrics if line["experts_active"] is not None]
    return {
        "step": [line["step"] for line in lines],
        "experts_active": [line["experts_active"] for line in lines],
        "pairs": pairs,
    }


def routing_distances(weights: Mapping[str, np.ndarray], seed: int) -> list[dict[str, Any]]:
    """How far routing differs between domains, and how far it differs within one.

    Args:
      weights: `{domain: [Y, I, E]}`, mean weights of every instance.
      seed: seed of the random halves.

    Returns:
      For every layer: `between`, the largest total-variation distance between the mean weights of
      two `domains`; and `within`, the distance between random halves of one domain, averaged over
      many halvings, for the domain where it is largest (`within_domain`).

    Raises:
      InputError: fewer than two domains, or a domain with fewer than two instances.
    """
    small = [domain for domain, w_YxIxE in weights.items() if w_YxIxE.shape[1] < 2]
    if len(weights) < 2 or small:
        raise InputError(
            "test set: comparing routing requires at least 2 domains of at least 2 instances; got "
            f"{len(weights)} domains"
            + (f", with too few instances in {', '.join(small)}" if small else "")
        )
    between = {
        (a, b): total_variation(weights[a].mean(axis=1), weights[b].mean(axis=1))
        for a, b in itertools.combinations(weights, 2)
    }
    rng = np.random.default_rng(seed)
    within = {domain: half_distance(w_YxIxE, rng) for domain, w_YxIxE in weights.items()}
    num_layers = next(iter(weights.values())).shape[0]
    distances = []
    for layer in range(num_layers):
        most_between, pair = max((distance[layer], pair) for pair, distance in between.items())
        most_within, domain = max((distance[layer], name) for name, distance in within.items())
        distances.append(
            {
                "layer": layer,
                "between": float(most_between),
                "domains": list(pair),
                "within": float(most_within),
                "within_domain": domain,
            }
        )
    return distances


def total_variation(p_xE: np.ndarray, q_xE: np.ndarray) -> np.ndarray:
    """Half the sum of absolute differences: 0 for equal distributions, 1 for disjoint ones."""
    return 0.5 * np.abs(p_xE - q_xE).sum(axis=-1)


def half_distance(w_YxIxE: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The mean distance, per layer, between two random halves of the instances."""
    count = w_YxIxE.shape[1]
    distances = []
    for _ in range(HALVINGS):
        order = rng.permutation(count)
        first, second = w_YxIxE[:, order[: count // 2]], w_YxIxE[:, order[count // 2 :]]
        distances.append(total_variation(first.mean(axis=1), second.mean(axis=1)))
    return np.mean(distances, axis=0)


def distance_table(distances: Sequence[Mapping[str, Any]]) -> str:
    """Routing distances as an aligned table."""
    lines = ["layer  between domains  within a domain  most different"]
    for row in distances:
        lines.append(
            f"{row['layer']:5}  {row['between']:15.3f}  {row['within']:15.3f}  "
            + " and ".join(row["domains"])
        )
    return "\n".join(lines)
