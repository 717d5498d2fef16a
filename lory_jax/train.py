"""Trains a Lory, or its dense baseline (experts=0), on prepared data.

    python -m lory_jax.train --config=configs/local.py:experts=8 --data=DIR --workdir=W

The same command again goes on from the newest checkpoint of W. Ctrl-C or SIGTERM saves and stops
(exit status 130 or 143).
"""

import functools
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from lory_jax import cli
from lory_jax.data.manifest import load_tokenizer, read_manifest
from lory_jax.data.pipeline import TrainingBatches, evaluation_sets
from lory_jax.evaluation.perplexity import token_losses
from lory_jax.flops import flops_per_token, parameter_counts, peak_flops
from lory_jax.model.transformer import ModelConfig
from lory_jax.parallel import check_batch, make_mesh, place_batch, start_process
from lory_jax.training.checkpoint import Checkpoints
from lory_jax.training.metrics import MetricsLog
from lory_jax.training.optimizer import learning_rate, make_optimizer
from lory_jax.training.profile import Trace, parse_steps
from lory_jax.training.start import check_source, state_from
from lory_jax.training.state import State, abstract_state, init_state
from lory_jax.training.step import make_loss_step, make_train_step
from lory_jax.training.upcycle import upcycle
from lory_jax.training.workdir import (
    DENSE,
    EXPERTS,
    open_workdir,
    phase_config,
)


@dataclass(frozen=True)
class Phase:
    """The dense warm-up or the training of experts: two phases of one run."""

    name: str
    config: ModelConfig
    train_step: Callable[..., Any]
    loss_step: Callable[..., Any]


def main(argv: list[str]) -> None:
    parser = cli.Parser("train", __doc__)
    parser.add_config_flag()
    parser.add_argument("--data", required=True, type=Path, help="directory written by prepare")
    parser.add_argument("--workdir", required=True, type=Path, help="where the run is kept")
    parser.add_argument(
        "--init_from",
        type=Path,
        metavar="W0",
        help="start from the newest parameters of this work directory (another run's, or made by "
        "convert from-hf), with fresh moments at step 0",
    )
    parser.add_argument(
        "--profile",
        metavar="FIRST:LAST",
        help="write a profiler trace of these steps, counted from 1, to W/profile",
    )
    args = parser.parse(argv)
    try:
        profile = parse_steps(args.profile) if args.profile else None
    except ValueError as error:
        parser.error(f"--profile: {error}")
    start_process()
    train(args.config, args.data, args.workdir, args.init_from, profile)


def train(
    config: ConfigDict,
    data: Path,
    workdir: Path,
    init_from: Path | None = None,
    profile: tuple[int, int] | None = None,
) -> None:
    """Runs, or goes on with, one training run.

    `init_from` is a work directory to start from; `profile` the first and last step to trace.
    """
    # ---------------------------------------------------------------- what to train, on what
    model, settings = ModelConfig.for_platform(config.model, jax.default_backend()), config.train
    mesh = make_mesh(**config.parallel)
    check_batch(settings.global_batch_size, settings.microbatches, model.batch_axis, mesh)
    manifest = read_manifest(data)
    tokenizer = load_tokenizer(manifest, data)
    batches = TrainingBatches(
        data,
        sequence_length=model.sequence_length,
        vocab_size=model.vocab_size,
        global_batch_size=settings.global_batch_size,
        seed=settings.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    validation = {
        domain: rows[: settings.validation_batches * settings.global_batch_size]
        for domain, rows in evaluation_sets(data, "validation").items()
    }
    if init_from is not None:
        check_source(init_from, model, tokenizer, data)
    open_workdir(workdir, config.to_dict(), data)
    announce(model, config, mesh, batches)

    # ---------------------------------------------------------------- the two phases
    optimizer = make_optimizer(
        settings.beta1,
        settings.beta2,
        settings.epsilon,
        settings.weight_decay,
        settings.first_moment_dtype,
    )
    schedule = functools.partial(
        learning_rate,
        steps=settings.steps,
        peak=settings.learning_rate,
        warmup_fraction=settings.warmup_fraction,
        final_fraction=settings.final_learning_rate_fraction,
    )
    dense_steps = round(settings.dense_warmup_fraction * settings.steps) if model.num_experts else 0

    def make_phase(name: str) -> Phase:
        phase_model = phase_config(model, name)
        step = make_train_step(
            phase_model, optimizer, schedule, settings.clip_norm, mesh, settings.microbatches
        )
        loss_step = make_loss_step(
            phase_model, mesh, phase_model.measured_routing, phase_model.segment_length
        )
        return Phase(name, phase_model, step, loss_step)

    # ---------------------------------------------------------------- where to start
    # 1. The newest intact checkpoint of this run; 2. --init_from; 3. scratch. Never 2 or 3 over
    # damaged checkpoints.
    checkpoints = Checkpoints(workdir / "checkpoints", keep=config.checkpoint.keep)
    restored = checkpoints.restore_newest(
        lambda meta: abstract_state(phase_config(model, meta["phase"]), optimizer, mesh)
    )
    if restored is not None:
        state, meta = restored
        phase, start = make_phase(meta["phase"]), meta["step"]
        print(f"resuming {workdir} at step {start} of {settings.steps}", flush=True)
    elif init_from is not None:
        state, phase_name = state_from(init_from, model, optimizer, mesh)
        phase, start = make_phase(phase_name), 0
        print(f"starting from {init_from}", flush=True)
    else:
        phase, start = make_phase(DENSE if dense_steps else EXPERTS), 0
        state = init_state(phase.config, optimizer, mesh, settings.seed)
    if start >= settings.steps:
        print(f"{workdir}: finished at step {start}, nothing to do")
        return

    # ---------------------------------------------------------------- the loop
    log = MetricsLog(
        workdir,
        start_step=start,
        steps=settings.steps,
        tokens_per_step=settings.global_batch_size * model.sequence_length,
        flops_per_token=flops_per_token(model),
        peak_flops=peak_flops(jax.devices()[0].device_kind),
        log_every_steps=settings.log_every_steps,
    )
    stop = StopRequest()
    with jax.set_mesh(mesh), Trace(profile, workdir / "profile") as trace:
        batch_iterator = batches.iterate(start)
        for step in range(start, settings.steps):
            if phase.name == DENSE and model.num_experts and step == dense_steps:
                state = upcycle(state, model, optimizer, mesh, settings.seed)
                phase = make_phase(EXPERTS)
                print(f"step {step}: every FFN upcycled to {model.num_experts} experts", flush=True)
            completed = step + 1
            trace.before(completed)
            batch = place_batch(next(batch_iterator), mesh, model.batch_axis)
            state, metrics = phase.train_step(state, batch)
            trace.after(completed, metrics)
            log.dispatched(completed, metrics)
            is_last = completed == settings.steps
            if completed % settings.validate_every_steps == 0 or is_last:
                log.settle()
                log.write(**validate(phase, state, validation, settings.global_batch_size, mesh))
                log.restart_clock()
            if completed % config.checkpoint.every_steps == 0 or is_last or stop.signal:
                # The step is the data position: it is saved with the state, before the next draw.
                log.settle()
                checkpoints.save(state, phase.name)
                log.restart_clock()
            if stop.signal:
                break
    log.close()
    checkpoints.close()
    if stop.signal and not is_last:
        print(f"stopped by a signal; {workdir} is saved at step {completed}", file=sys.stderr)
        sys.exit(128 + stop.signal)
    print(f"{workdir}: finished at step {settings.steps}")


def validate(
    phase: Phase,
    state: State,
    sets: dict[str, np.ndarray],
    batch_size: int,
    mesh: Mesh,
) -> dict[str, Any]:
    """Loss in nats per token over positions >= T: per domain, and their mean."""
    T = phase.config.segment_length
    losses = {}
    for domain, instances in sets.items():
        nll = token_losses(
            phase.loss_step, state["params"], instances, batch_size, mesh, phase.config.batch_axis
        )
        losses[domain] = float(nll[:, T:].mean(dtype=np.float64))
    mean = float(np.mean(list(losses.values())))
    return {"validation_loss": mean, "validation_loss_by_domain": losses}


def announce(model: ModelConfig, config: ConfigDict, mesh: Mesh, batches: TrainingBatches) -> None:
    """Says what is about to be trained."""
    counts = parameter_counts(model)
    tokens = config.train.global_batch_size * model.sequence_length
    kind = f"Lory with {model.num_experts} experts" if model.num_experts else "dense baseline"
    if model.num_experts and model.routing != "causal":
        kind = f"baseline {model.routing} with {model.num_experts} experts"
    epochs = config.train.steps / batches.batches_per_epoch
    device = jax.devices()[0].device_kind
    print(
        f"{kind}: {counts['total'] / 1e6:,.1f}M parameters, {counts['active'] / 1e6:,.1f}M active\n"
        f"{config.train.steps:,} steps of {tokens:,} tokens, {epochs:.2f} epochs of "
        f"{batches.num_instances:,} instances\n"
        f"mesh {dict(mesh.shape)} of {device}, attention by {model.attention}"
        + ("" if peak_flops(device) else " (peak unknown: no MFU)"),
        flush=True,
    )


class StopRequest:
    """Turns the first SIGINT or SIGTERM into a request that the loop sees; a second one kills."""

    def __init__(self) -> None:
        self.signal = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._request)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.signal = number
        signal.signal(number, signal.SIG_DFL)
        print("stopping after this step; once more to stop at once", file=sys.stderr, flush=True)


if __name__ == "__main__":
    cli.run(main)
