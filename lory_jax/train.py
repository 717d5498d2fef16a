"""Trains a Lory, or its dense baseline (experts=0), on prepared data.

    python -m lory_jax.train --config=configs/local.py:experts=8 --data=DIR --workdir=W

The same command again goes on from the newest checkpoint of W. Ctrl-C or SIGTERM saves after the
step under way and stops. Exit status: 0 the run is finished; 1 an input cannot be used; 2 a flag
or field is wrong; 3 the losses were no numbers any more; 75 another process is gone, starting all
again goes on; 130, 143 stopped by a signal and saved.
"""

import contextlib
import functools
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from lory_jax import cli
from lory_jax.data.batches import Lookahead, TrainingBatches
from lory_jax.data.prepared import PreparedData
from lory_jax.errors import InputError
from lory_jax.evaluation.perplexity import token_losses
from lory_jax.model.config import ModelConfig
from lory_jax.model.flops import flops_per_token, parameter_counts, peak_flops
from lory_jax.parallel import check_batch, make_mesh, place_batch, start_process
from lory_jax.run.checkpoints import Checkpoints, Meta, reason
from lory_jax.run.directory import (
    CONFIG,
    DENSE,
    EXPERTS,
    open_workdir,
    phase_config,
)
from lory_jax.run.retention import Retention
from lory_jax.storage import is_remote, storage_path
from lory_jax.training.initialization_from import check_source, state_from
from lory_jax.training.monitoring.goodput import Goodput
from lory_jax.training.monitoring.loss_watch import diverged
from lory_jax.training.monitoring.metrics_log import MetricsLog
from lory_jax.training.monitoring.signals import Agreement, SaveTimer, StopRequest, Wishes
from lory_jax.training.monitoring.trace import Trace, parse_steps
from lory_jax.training.optimizer import learning_rate, make_optimizer
from lory_jax.training.state import State, abstract_state, init_state
from lory_jax.training.step import make_loss_step, make_norms, make_train_step
from lory_jax.training.upcycle import upcycle

PEER_IS_GONE = 75  # exit status


@dataclass(frozen=True)
class Phase:
    """The dense warm-up or the training of experts: two phases of one run."""

    name: str
    config: ModelConfig
    batch_size: int  # of all processes
    train_step: Callable[..., Any]
    loss_step: Callable[..., Any]
    norms: Callable[..., Any]


def main(argv: list[str]) -> None:
    parser = cli.Parser("train", __doc__)
    parser.add_config_flag()
    parser.add_argument(
        "--data", required=True, type=storage_path, help="directory written by prepare"
    )
    parser.add_argument("--workdir", required=True, type=storage_path, help="where the run is kept")
    parser.add_argument(
        "--init_from",
        type=storage_path,
        metavar="W0",
        help="start from the newest parameters of this work directory (another run's, or made by "
        "convert from-hf), with fresh moments at step 0",
    )
    parser.add_argument(
        "--profile",
        metavar="FIRST:LAST",
        help="write a profiler trace of these steps, counted from 1, to W/profile",
    )
    parser.add_argument(
        "--change_steps",
        action="store_true",
        help="let a run go on with another config.train.steps (its schedules stretch with it)",
    )
    args = parser.parse(argv)
    try:
        profile = parse_steps(args.profile) if args.profile else None
    except ValueError as error:
        parser.error(f"--profile: {error}")
    start_process()
    # JAX's own handler only takes notes: until the loop begins there is nothing to save.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        train(args.config, args.data, args.workdir, args.init_from, profile, args.change_steps)
    except (InputError, SystemExit) as end:
        if not Checkpoints.has_failed_saves:
            raise
        _leave(end)
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        # Without the usual clean-up, which waits for all processes.
        print(
            f"error: a step failed, most likely because another process is gone: {reason(error)}",
            file=sys.stderr,
            flush=True,
        )
        os._exit(PEER_IS_GONE)
    if Checkpoints.has_failed_saves:
        _leave(SystemExit(0))


def _leave(end: InputError | SystemExit) -> None:
    """Ends the process at once, without waiting for threads of saves that failed."""
    if isinstance(end, InputError):
        print(f"error: {end}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(end.status if isinstance(end, InputError) else int(end.code or 0))


def train(
    config: ConfigDict,
    data: Path,
    workdir: Path,
    init_from: Path | None = None,
    profile: tuple[int, int] | None = None,
    change_steps: bool = False,
) -> None:
    """Runs, or goes on with, one training run.

    `init_from` is a work directory to start from; `profile` the first and last step to trace;
    `change_steps` lets the number of steps differ from that of the run so far.
    """
    goodput = Goodput(since=time.monotonic())
    # ---------------------------------------------------------------- what to train, on what
    model, settings = ModelConfig.for_platform(config.model, jax.default_backend()), config.train
    saves = config.checkpoint
    mesh = make_mesh(**config.parallel)
    check_batch(settings.global_batch_size, settings.microbatches, model.batch_axis, mesh)
    prepared = PreparedData.open(data)
    tokenizer = prepared.tokenizer
    batches = prepared.training_batches(
        sequence_length=model.sequence_length,
        vocab_size=model.vocab_size,
        global_batch_size=settings.global_batch_size,
        seed=settings.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    validation = {
        domain: rows[: settings.validation_batches * settings.global_batch_size]
        for domain, rows in prepared.held_out("validation").items()
    }
    if init_from is not None:
        check_source(init_from, model, tokenizer, data)
    lock = open_workdir(workdir, config.to_dict(), prepared, change_steps)
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
        norms = make_norms(phase_model, mesh, settings.microbatches)
        return Phase(name, phase_model, settings.global_batch_size, step, loss_step, norms)

    # ---------------------------------------------------------------- where to start
    # 1. The newest intact checkpoint of this run; 2. --init_from; 3. scratch. Never 2 or 3 over
    # damaged checkpoints.
    agreement = Agreement(mesh)
    checkpoints = Checkpoints(
        workdir / "checkpoints",
        Retention(saves.keep, saves.keep_best, saves.keep_every_steps),
        all_well=lambda well: not agreement.now(Wishes(damage=not well)).damage,
        witness=None if is_remote(workdir) else workdir / CONFIG,
    )
    restored = checkpoints.restore_newest(
        lambda meta: abstract_state(phase_config(model, meta["phase"]), optimizer, mesh)
    )
    meta: Meta = {}
    if restored is not None:
        state, meta = restored
        phase, start = make_phase(meta["phase"]), meta["step"]
        goodput.resume(meta.get("goodput", {}))
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
        counts=meta.get("watch"),
    )
    goodput.repeats(log.repeated_seconds)
    timer = SaveTimer(saves.every_minutes)
    ahead = Lookahead(batches.iterate(start))
    stop = StopRequest()
    first_of_phase, batch, wishes = start, None, Wishes()
    failure: InputError | None = None
    goodput.begin()
    with jax.set_mesh(mesh), Trace(profile, workdir / "profile") as trace:
        for step in range(start, settings.steps):
            # Past the border, too: --change_steps may have moved it.
            if phase.name == DENSE and model.num_experts and step >= dense_steps:
                with goodput.starting():
                    state = upcycle(state, model, optimizer, mesh, settings.seed)
                phase, first_of_phase = make_phase(EXPERTS), step
                print(f"step {step}: every FFN upcycled to {model.num_experts} experts", flush=True)
            completed, previous_batch = step + 1, batch
            trace.before(completed)
            with goodput.during("stall"):
                batch = place_batch(ahead.next(), mesh, model.batch_axis)
            with goodput.starting() if step == first_of_phase else contextlib.nullcontext():
                state, metrics = phase.train_step(state, batch)
            trace.after(completed, metrics)
            log.dispatched(completed, metrics)
            if previous_batch is not None and log.watch.in_a_row >= settings.max_skipped_steps:
                # The step before this one was the last straw. Nothing is saved: the checkpoints
                # that are there are older than the trouble, or as good as this state.
                norms = phase.norms(state["params"], previous_batch)
                failure = diverged(workdir, step, log.watch, norms, batches.record_ids(step - 1))
                break
            wishes = agreement.after_step(
                Wishes(stop.signal, ahead.damage is not None, timer.is_due())
            )
            is_last = completed == settings.steps
            is_validated = completed % settings.validate_every_steps == 0 or is_last
            is_saved = completed % saves.every_steps == 0 or is_last or any(wishes)
            if is_validated or is_saved:
                log.settle()
                found: dict[str, Any] = {}
                if is_validated:
                    with goodput.during("validation"):
                        found = validate(phase, state, validation, mesh)
                log.write(**found, goodput=goodput.seconds())
                if is_saved:
                    # The step is the data position: it is saved with the state, before the next
                    # draw, and after its line of metrics: a resumed run does not log it again.
                    with goodput.during("save"):
                        checkpoints.save(
                            state,
                            phase.name,
                            validation_loss=found.get("validation_loss"),
                            watch=log.watch.counts(),
                            goodput=goodput.seconds(),
                        )
                    timer.restart()
                log.restart_clock()
            if wishes.damage and not is_last:
                failure = ahead.damage or InputError("another process cannot read its data")
            if failure or wishes.signal:
                break

    # ---------------------------------------------------------------- the end
    try:
        with goodput.during("save"):
            checkpoints.close()
    finally:
        log.close()
    say(str(goodput))
    if failure is not None:
        if wishes.damage:
            say(f"{workdir} is saved at step {completed}")
        raise failure
    if wishes.signal and not is_last:
        print(f"stopped by a signal; {workdir} is saved at step {completed}", file=sys.stderr)
        sys.exit(128 + wishes.signal)
    say(f"{workdir}: finished at step {settings.steps}")
    del lock  # held until here


def validate(
    phase: Phase, state: State, sets: Mapping[str, np.ndarray], mesh: Mesh
) -> dict[str, Any]:
    """Loss in nats per token over positions >= T: per domain, and their mean."""
    T = phase.config.segment_length
    losses = {}
    for domain, instances in sets.items():
        nll = token_losses(
            phase.loss_step,
            state["params"],
            instances,
            phase.batch_size,
            mesh,
            phase.config.batch_axis,
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
        + (f", merged FFN by {model.merged_ffn}" if model.num_experts else "")
        + ("" if peak_flops(device) else " (peak unknown: no MFU)"),
        flush=True,
    )


def say(text: str) -> None:
    """Prints a line, once for all processes."""
    if jax.process_index() == 0:
        print(text, flush=True)


if __name__ == "__main__":
    cli.run(main)
