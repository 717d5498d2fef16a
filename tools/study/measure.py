"""Measures a finished run beside its losses, and writes one JSON object.

python -m tools.study.measure --workdir=RUN_DIR --data=DIR --out=FILE.json [--routing]
"""

import argparse
import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lory_jax.analysis.distances import mean_by_origin
from lory_jax.analysis.routing import instance_weights, segment_weights
from lory_jax.api import load
from lory_jax.model.config import ModelConfig
from lory_jax.model.experts import MATRICES
from lory_jax.model.flops import flops_per_token, parameter_counts, trained_flops_per_token
from lory_jax.model.routing_rules import GATED
from lory_jax.run.directory import RunDirectory
from lory_jax.storage import write_atomically

# Metrics of sparse models (lory_jax/training/step.py).
LOAD = ("experts_per_token", "load_violation", "dropped_tokens")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("--workdir", "--data", "--out"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--routing", action="store_true", help="the routing weights of folders")
    args = parser.parse_args()
    run = RunDirectory(args.workdir)
    found = measure(run) | (routing(run, args.data) if args.routing else {})
    write_atomically(args.out, json.dumps(found) + "\n")


def measure(run: RunDirectory) -> dict[str, Any]:
    """Curve, seconds, FLOPs, parameters and, of a model with experts, how they differ."""
    model = load(run.path)
    lines = run.read_metrics()
    found: dict[str, Any] = {
        "steps": lines[-1]["step"],
        "tokens": lines[-1]["tokens"],
        "curve": [
            [line["step"], round(line["validation_loss"], 5)]
            for line in lines
            if "validation_loss" in line
        ],
        "seconds": math.fsum(line["step_seconds"] for line in lines),
        "step_seconds": float(np.median([line["step_seconds"] for line in lines])),
        "flops_per_token": trained_flops_per_token(
            model.config, run.train_config.get("segment_schedule", "")
        ),
        "parameters": parameter_counts(model.config),
    }
    if model.config.num_experts:
        pairs = len(model.config.layer_numbers) * model.config.num_experts
        # Where tokens are routed, the weights of a segment say nothing about an expert's load.
        if lines[-1]["experts_active"] is not None and not model.config.routes_tokens:
            found["experts_used"] = lines[-1]["experts_active"] / pairs
        found["expert_cosine"] = expert_cosine(model.params["layers"]["ffn"])
    loads = {name: of_load(lines, name) for name in LOAD if name in lines[-1]}
    if model.config.num_experts and model.config.routing in GATED:
        found["flops_per_token"] = gated_flops(model.config, loads["experts_per_token"]["mean"])
    return found | loads


def gated_flops(config: ModelConfig, experts_per_token: float) -> float:
    """FLOPs per token where gates open as many experts on average, which need not be the aim."""
    one, two = (flops_per_token(dataclasses.replace(config, experts_per_token=k)) for k in (1, 2))
    return one + (two - one) * (experts_per_token - 1)


def of_load(lines: Sequence[Mapping[str, Any]], name: str) -> dict[str, float]:
    """The mean of a metric over the steps with experts, and over the last tenth of those."""
    values = [line[name] for line in lines if line.get(name) is not None]
    last = values[-max(1, len(values) // 10) :]
    return {"mean": round(float(np.mean(values)), 4), "last": round(float(np.mean(last)), 4)}


def expert_cosine(ffn: Any) -> float:
    """The mean cosine between two experts of a layer, over pairs and layers; 1 for copies."""
    if "gate_a" in ffn:  # what each expert adds to the FFN that all share
        factors = ([np.asarray(ffn[f"{name}_{f}"], np.float64) for f in "ab"] for name in MATRICES)
        matrices = [a @ b for a, b in factors]
    else:
        matrices = [np.asarray(ffn[name], np.float64) for name in MATRICES]
    w_YxExP = np.concatenate([m.reshape(*m.shape[:2], -1) for m in matrices], axis=-1)
    w_YxExP /= np.linalg.norm(w_YxExP, axis=-1, keepdims=True)
    E = w_YxExP.shape[1]
    if E == 1:
        return 1.0
    sums_Y = np.sum(w_YxExP.sum(axis=1) ** 2, axis=-1)
    return float(np.mean((sums_Y - E) / (E * (E - 1))))


def routing(run: RunDirectory, data: Path) -> dict[str, Any]:
    """The mean weights of every folder: `[O, Y, E]` for each domain of the validation set.

    Folders are in the order of their names.
    """
    model, prepared = load(run.path), run.open_data(data)
    sets = prepared.held_out_with_instances("validation")
    weights = instance_weights(
        segment_weights(model, sets, run.config["train"]["global_batch_size"])
    )
    origins = prepared.held_out_origins("validation")
    return {
        "routing_by_origin": {
            domain: mean_by_origin(w_YxIxE, origins[domain]).round(4).tolist()
            for domain, w_YxIxE in weights.items()
        },
    }


if __name__ == "__main__":
    main()
