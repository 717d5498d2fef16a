"""What the sums that guard checkpoints cost, over the steps between two saves.

python benchmarks/integrity.py [--config=configs/local.py:experts=8] [--json=FILE]
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lory_jax.config import load_config
from lory_jax.model.config import ModelConfig
from lory_jax.parallel import make_mesh, place_batch
from lory_jax.run.checkpoints import leaf_sums
from lory_jax.training.optimizer import make_optimizer
from lory_jax.training.state import init_state
from lory_jax.training.step import make_train_step

ROUNDS = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="configs/local.py:experts=8")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    config = load_config(args.config)
    model = ModelConfig.for_platform(config.model, jax.default_backend())
    mesh, optimizer = make_mesh(1, 0, 1), make_optimizer(config.train)
    state = init_state(model, optimizer, mesh, seed=0)
    step = make_train_step(model, optimizer, mesh)
    shape = (config.train.global_batch_size, model.sequence_length + 1)
    tokens = np.random.default_rng(0).integers(0, model.vocab_size, shape).astype(np.int32)
    steps, sums = [], []
    with jax.set_mesh(mesh):
        batch = place_batch(tokens, mesh, model.batch_axis)
        state, _ = step(state, batch)
        leaf_sums(state)
        for _ in range(ROUNDS):  # in turns, so that other work disturbs both alike
            began = time.perf_counter()
            state, metrics = step(state, batch)
            jax.block_until_ready((state, metrics))
            steps.append(time.perf_counter() - began)
            sums.append(seconds(leaf_sums, state))
    every = config.checkpoint.every_steps
    result: dict[str, Any] = {
        "config": args.config,
        "step_seconds": statistics.median(steps),
        "sums_seconds": statistics.median(sums),
        "every_steps": every,
    }
    result["share"] = result["sums_seconds"] / (every * result["step_seconds"])
    step_ms, sums_ms = result["step_seconds"] * 1e3, result["sums_seconds"] * 1e3
    print(
        f"a step {step_ms:.1f} ms, the sums {sums_ms:.1f} ms every {every} steps: "
        f"{result['share']:.4%} of the time"
    )
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


def seconds(function: Callable[..., Any], *arguments: Any) -> float:
    began = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
