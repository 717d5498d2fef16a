"""Measures how long a step of each arm takes beside Lory's, for contrasts at equal seconds.

    python -m tools.study.step_seconds [--out=docs/study/step_seconds.json] [--rounds=15]

The arms take turns on one core, so that a change of the machine's speed meets all of them. A step
of ReMoE takes longer at the start of training, when a token has more than one expert: its turns are
spread over a whole run. Run it on a quiet machine. The study trains the arms of `SECONDS_ARMS` for
as many steps as fit into the seconds of Lory's run; the numbers of steps are fixed by the file, not
by a clock during training.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from lory_jax.config import load_config
from lory_jax.model.config import ModelConfig
from lory_jax.parallel import make_mesh
from lory_jax.storage import write_atomically
from lory_jax.training.optimizer import make_optimizer
from lory_jax.training.phases import count_dense_steps
from lory_jax.training.state import init_state
from lory_jax.training.step import make_train_step
from tools.study.arms import FAMILIES, SECONDS_ARMS, STEP_SECONDS_FILE
from tools.study.kinds import STEPS

RECIPE = str(Path(__file__).with_name("recipe.py"))
STEPS_A_ROUND = 10
CHANGING = ("remoe",)  # arms whose steps do not all take as long


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=STEP_SECONDS_FILE)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    families = {family.name: family for family in FAMILIES}
    steps = {name: stepper(dict(families[name].settings)) for name in ("lory", *SECONDS_ARMS)}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(args.rounds):
        for name, step in steps.items():
            if number and name in CHANGING:
                for _ in range(STEPS // args.rounds - STEPS_A_ROUND):
                    step()
            seconds[name].append(timed(step))
            print(f"round {number + 1}: {name} {seconds[name][-1]:.4f} s", flush=True)
    ratios = {
        name: statistics.mean(own / base for own, base in zip(values, seconds["lory"], strict=True))
        for name, values in seconds.items()
    }
    found = {
        "date": date.today().isoformat(),
        "machine": f"one core of {platform.machine()}, jax {jax.__version__}",
        "step_seconds": {
            name: round(statistics.median(values), 5) for name, values in seconds.items()
        },
        "over_lory": {name: round(ratio, 3) for name, ratio in ratios.items()},
    }
    write_atomically(args.out, json.dumps(found, indent=1) + "\n")
    print(f"wrote {args.out}")


def stepper(settings: dict[str, object]) -> Callable[[], None]:
    """A function that makes one training step, compiled already."""
    config = load_config(RECIPE, [(name, str(value)) for name, value in settings.items()])
    model_config = ModelConfig.for_platform(config.model, jax.default_backend())
    mesh = make_mesh(**config.parallel)
    optimizer = make_optimizer(config.train, count_dense_steps(config))
    shape = config.train.global_batch_size, model_config.sequence_length + 1
    tokens = np.random.default_rng(0).integers(0, model_config.vocab_size, shape)
    with jax.set_mesh(mesh):
        state = init_state(model_config, optimizer, mesh, 0)
        train_step = make_train_step(model_config, optimizer, mesh, config.train.microbatches)

    def step() -> None:
        nonlocal state
        with jax.set_mesh(mesh):
            state, metrics = train_step(state, jnp.asarray(tokens, jnp.int32))
            jax.block_until_ready(metrics)

    step()
    return step


def timed(step: Callable[[], None]) -> float:
    """The median seconds of a few steps."""
    step()  # the caches held another arm's arrays
    times = []
    for _ in range(STEPS_A_ROUND):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


if __name__ == "__main__":
    main()
