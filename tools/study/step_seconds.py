"""Measures how long a step of some arms takes beside that of the one they are compared with.

    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python -m tools.study.step_seconds [--stage=A|beyond]
        [--out=FILE.json] [--rounds=15]

launch/study.sh trains with that GLIBC_TUNABLES. All arms have their tuned settings, and take turns
on one core, so that a change of the machine's speed meets all of them. A step of ReMoE takes longer
at the start of training, when a token has more than one expert: its turns are spread over a whole
run. Where segments change their length over a run, every length is measured and counts by its share
of the steps. The dense warm-up is left out. All steps train on one batch of random tokens. Run it
on a quiet machine.

With stage A, the study trains the arms of `SECONDS_ARMS` for as many steps as fit into the seconds
of Lory's run; the numbers of steps are fixed by the file, not by a clock during training. With
stage beyond, docs/beyond.md shows the ratios.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import date
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from lory_jax.config import load_config
from lory_jax.errors import InputError
from lory_jax.model.config import ModelConfig
from lory_jax.parallel import make_mesh
from lory_jax.segment_schedule import shares_of_lengths
from lory_jax.storage import write_atomically
from lory_jax.training.optimizer import make_optimizer
from lory_jax.training.phases import count_dense_steps
from lory_jax.training.state import init_state
from lory_jax.training.step import make_train_step
from tools.study.arms import ARMS, FAMILIES, SECONDS_ARMS, STEP_SECONDS_FILES
from tools.study.beyond_arms import BEYOND_ARMS, BEYOND_BASE
from tools.study.kinds import STEPS, Settings
from tools.study.queue import Queue, make_jobs
from tools.study.report import OUT
from tools.study.results import Results, run_id

RECIPE = str(Path(__file__).with_name("recipe.py"))
STEPS_A_ROUND = 10
CHANGING = ("remoe",)  # arms whose steps do not all take as long

Step = Callable[[], None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stage", choices=("A", "beyond"), default="A")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    base, measured = arms_of(args.stage)
    steps = {name: steppers(settings) for name, settings in measured.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(args.rounds):
        for name, by_share in steps.items():
            if name in CHANGING:  # a turn in the middle of its part of a run
                between = STEPS // args.rounds - STEPS_A_ROUND
                for _ in range(between if number else between // 2):
                    by_share[0][1]()
            seconds[name].append(sum(share * timed(step) for share, step in by_share))
            print(f"round {number + 1}: {name} {seconds[name][-1]:.4f} s", flush=True)
    # Medians, which a disturbed turn does not move, where all steps take as long.
    averages = {
        name: (statistics.mean if name in CHANGING else statistics.median)(values)
        for name, values in seconds.items()
    }
    found = {
        "date": date.today().isoformat(),
        "machine": f"one core of {platform.machine()}, jax {jax.__version__}",
        "glibc_tunables": os.environ.get("GLIBC_TUNABLES", ""),
        "base": base,
        "step_seconds": {name: round(value, 5) for name, value in averages.items()},
        "over_base": {name: round(x / averages[base], 3) for name, x in averages.items()},
        "turns": {name: [round(x, 5) for x in values] for name, values in seconds.items()},
    }
    out = args.out or STEP_SECONDS_FILES[args.stage]
    write_atomically(out, json.dumps(found, indent=1) + "\n")
    print(f"wrote {out}")


def arms_of(stage: str) -> tuple[str, dict[str, Settings]]:
    """What the others are compared with, and the settings of all.

    Raises:
      InputError: an arm has no settings yet, because its family is not tuned or a run that it
        starts from is not made.
    """
    if stage == "A":
        names = ["lory", *SECONDS_ARMS]
    else:
        of_stage = [arm for arm in BEYOND_ARMS if not arm.keeps_run]
        # Another learning rate changes no step's seconds.
        names = [BEYOND_BASE, *(arm.name for arm in of_stage if not arm.factors)]
    stages = ("A",) if stage == "A" else ("A", stage)  # the recipe is an arm of stage A
    queue = Queue(make_jobs(FAMILIES, ARMS, stages), Results(OUT / "runs"))
    found = {}
    for job in queue.jobs:
        if job.id in {run_id(name, 0) for name in names}:
            settings = queue.settings(job)
            if settings is None:
                raise InputError(f"{job.id}: its settings are not known before its family's trials")
            found[job.source.name] = settings
    return names[0], {name: found[name] for name in names}


def steppers(settings: Mapping[str, object]) -> list[tuple[float, Step]]:
    """For every segment length of a run, its share of the steps and a function that makes one."""
    config = load_config(RECIPE, [(name, str(value)) for name, value in settings.items()])
    model_config = ModelConfig.for_platform(config.model, jax.default_backend())
    mesh = make_mesh(**config.parallel)
    optimizer = make_optimizer(config.train, count_dense_steps(config))
    shape = config.train.global_batch_size, model_config.sequence_length + 1
    rows = np.random.default_rng(0).integers(0, model_config.vocab_size, shape)

    def stepper(length: int) -> Step:
        at_length = replace(model_config, segment_length=length)
        with jax.set_mesh(mesh):
            state = init_state(at_length, optimizer, mesh, 0)
            train_step = make_train_step(at_length, optimizer, mesh, config.train.microbatches)

        def step() -> None:
            nonlocal state
            with jax.set_mesh(mesh):
                state, metrics = train_step(state, jnp.asarray(rows, jnp.int32))
                jax.block_until_ready(metrics)

        step()  # compiles
        return step

    schedule = config.train.segment_schedule
    shares = shares_of_lengths(schedule, model_config.segment_length)
    return [(share, stepper(length)) for length, share in shares.items()]


def timed(step: Step) -> float:
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
