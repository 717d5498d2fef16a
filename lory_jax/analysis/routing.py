"""The routing of a run's test set: weights by domain, distances and utilisation (section 5.4).

Letters: I instances, L sequence, N segments, Y layers with experts, E experts.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lory_jax import api
from lory_jax.analysis.distances import routing_distances
from lory_jax.analysis.texts import telling_texts
from lory_jax.console import progress
from lory_jax.errors import InputError
from lory_jax.evaluation.held_out import batches_of
from lory_jax.run.directory import RunDirectory

ANALYSIS = "analysis.json"


def analyze_run(run: RunDirectory, data: Path | None = None, seed: int = 0) -> dict[str, Any]:
    """Routes the test set of a run's data, and returns what `analysis.json` holds.

    routing_weights: `{domain: [Y][E]}`, the mean weights of every layer.
    instances, origins: `{domain: count}`, of the test set.
    routing_distance: per layer, see `lory_jax.analysis.distances.routing_distances`.
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
    prepared = run.open_data(data)
    sets, origins = prepared.held_out_with_instances("test"), prepared.held_out_origins("test")
    by_segment = segment_weights(model, sets, run.train_config["global_batch_size"])
    weights = instance_weights(by_segment)
    return {
        "step": model.step,
        "checkpoint": run.step,
        "instances": {domain: len(rows) for domain, rows in sets.items()},
        "origins": {domain: len({*origins[domain]}) for domain in sets},
        "routing_weights": {d: w_YxIxE.mean(axis=1).tolist() for d, w_YxIxE in weights.items()},
        "routing_distance": [
            {**row, "layer": model.config.layer_numbers[row["layer"]]}
            for row in routing_distances(weights, origins, seed)
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
