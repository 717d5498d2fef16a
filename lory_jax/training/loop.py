"""The training loop, and how a run ends.

Every step is dispatched before the metrics of the step before it are read, so that the devices
always have work.
"""

import contextlib
import sys
from dataclasses import dataclass
from typing import Any

import jax
from jax import Array

from lory_jax.console import say
from lory_jax.data.batches import Lookahead
from lory_jax.errors import InputError
from lory_jax.model.flops import peak_flops, trained_flops_per_token
from lory_jax.parallel import place_batch
from lory_jax.training.monitoring.loss_watch import diverged
from lory_jax.training.monitoring.metrics_log import MetricsLog
from lory_jax.training.monitoring.signals import SaveTimer, StopRequest, Wishes
from lory_jax.training.monitoring.trace import Trace
from lory_jax.training.phases import Phase
from lory_jax.training.restore import Position
from lory_jax.training.setup import Setup
from lory_jax.training.validation import validation_losses


@dataclass(frozen=True)
class Ending:
    """Why the loop ended; without a failure and a signal, the run is finished.

    Attributes:
      step: completed steps.
      is_saved: whether the newest checkpoint is that of `step`.
      failure: what stopped the run.
      signal: the signal that stopped the run; 0 for none.
    """

    step: int
    is_saved: bool
    failure: InputError | None = None
    signal: int = 0


class Trainer:
    """Trains a run from a position on."""

    def __init__(self, run: Setup, position: Position, profile: tuple[int, int] | None = None):
        """Starts at `position`; `profile` is the first and last step to trace."""
        train = run.config.train
        self.run, self.position = run, position
        self.log = MetricsLog(
            run.directory,
            start_step=position.step,
            steps=train.steps,
            tokens_per_step=train.global_batch_size * run.model_config.sequence_length,
            flops_per_token=trained_flops_per_token(run.model_config, train.segment_schedule),
            peak_flops=peak_flops(jax.devices()[0].device_kind),
            log_every_steps=train.log_every_steps,
            counts=position.counts,
        )
        run.goodput.repeats(self.log.repeated_seconds)
        self._timer = SaveTimer(run.config.checkpoint.every_minutes)
        self._trace = Trace(profile, run.directory.profile)
        self._next_phase = run.phases.after(position.phase)
        self._first_step_of_phase = position.step
        self._batch: Array | None = None
        self._ahead = Lookahead(run.batches.iterate(position.step))
        self._stop = StopRequest()

    def train(self) -> Ending:
        """Trains until the last step, a signal, or a failure.

        Raises:
          JaxRuntimeError: a step failed; with several processes, mostly because another one died.
        """
        run, position = self.run, self.position
        steps, max_skipped = run.config.train.steps, run.config.train.max_skipped_steps
        run.goodput.begin()
        # A hidden transfer would make the host wait for the devices: it raises.
        with jax.set_mesh(run.mesh), jax.transfer_guard("disallow"), self._trace:
            while position.step < steps:
                # Do not change the order. A step is dispatched before the metrics of the one before
                # it are read. All processes act on the same requests at the same step. State and
                # data position are saved together, before the next batch is used. `>=`:
                # change_steps may have moved the border of the dense phase back.
                if self._next_phase and position.step >= run.phases.dense_steps:
                    self._enter(self._next_phase)
                previous_batch = self._batch
                self._train_step()
                if previous_batch is not None and self.log.watch.in_a_row >= max_skipped:
                    return self._diverged(previous_batch)
                wishes = run.agreement.after_step(self._wishes())
                self._validate_and_save(wishes)
                if position.step == steps:
                    break
                if wishes.damage:
                    other = InputError("another process cannot read its data")
                    return Ending(position.step, True, failure=self._ahead.damage or other)
                if wishes.signal:
                    return Ending(position.step, True, signal=wishes.signal)
        return Ending(position.step, True)

    def _enter(self, phase: Phase) -> None:
        position = self.position
        assert phase.upcycle is not None
        with self.run.goodput.starting():
            position.state = phase.upcycle(position.state)
        position.phase, self._next_phase = phase, None
        self._first_step_of_phase = position.step
        model = phase.model_config
        where = f" of {len(model.layer_numbers)} layers" if model.dense_layer_numbers else ""
        say(f"step {position.step}: every FFN{where} upcycled to {model.num_experts} experts")

    def _train_step(self) -> None:
        """Dispatches one step, then logs the step before it."""
        run, position = self.run, self.position
        phase, step = position.phase, position.step
        is_new_length = phase.lengths.changes_at(step)
        if is_new_length:
            say(f"step {step}: segments of {phase.lengths.at(step)} tokens")
        compiles = step == self._first_step_of_phase or is_new_length
        self._trace.before(position.step + 1)
        with run.goodput.during("stall"):
            self._batch = place_batch(self._ahead.next(), run.mesh, run.model_config.batch_axis)
        with run.goodput.starting() if compiles else contextlib.nullcontext():
            position.state, metrics = phase.train_step(step)(position.state, self._batch)
        position.step += 1
        self._trace.after(position.step, metrics)
        self.log.dispatched(position.step, metrics)

    def _diverged(self, batch: Array) -> Ending:
        """Ends the run: the step before the one just dispatched was one skipped step too many.

        Nothing is saved: the existing checkpoints were written before the skipped steps, or hold
        the same parameters.
        """
        run, last_logged = self.run, self.position.step - 1
        norms = self.position.phase.norms(self.position.state["params"], batch)
        record_ids = run.batches.record_ids(last_logged - 1)
        path = run.directory.diverged_file(last_logged)
        failure = diverged(path, last_logged, self.log.watch, norms, record_ids)
        return Ending(self.position.step, False, failure=failure)

    def _wishes(self) -> Wishes:
        return Wishes(self._stop.signal, self._ahead.damage is not None, self._timer.is_due())

    def _validate_and_save(self, wishes: Wishes) -> None:
        run, position = self.run, self.position
        is_last = position.step == run.config.train.steps
        is_validated = position.step % run.config.train.validate_every_steps == 0 or is_last
        is_saved = position.step % run.config.checkpoint.every_steps == 0 or is_last or any(wishes)
        if not is_validated and not is_saved:
            return
        self.log.settle()
        found: dict[str, Any] = {}
        if is_validated:
            with run.goodput.during("validation"):
                params = position.state["params"]
                found = validation_losses(position.phase, params, run.validation_sets, run.mesh)
        # The line of metrics comes before the save: a resumed run does not log this step again.
        self.log.write(**found, goodput=run.goodput.seconds())
        if is_saved:
            self._save(found.get("validation_loss"))
        self.log.restart_clock()

    def _save(self, validation_loss: float | None) -> None:
        run, position = self.run, self.position
        # Orbax copies the state to the host by itself.
        with run.goodput.during("save"), jax.transfer_guard_device_to_host("allow"):
            run.checkpoints.save(
                position.state,
                position.phase.name,
                validation_loss=validation_loss,
                watch=self.log.watch.counts(),
                goodput=run.goodput.seconds(),
            )
        self._timer.restart()


def finish(trainer: Trainer, ending: Ending) -> None:
    """Completes what is being written, says how the run ended, and exits after a signal.

    Raises:
      InputError: what stopped the run, or the last checkpoint or metrics could not be written.
    """
    run = trainer.run
    try:
        with run.goodput.during("save"):
            run.checkpoints.close()
    finally:
        trainer.log.close()
        if run.lock is not None:
            run.lock.release()
    say(str(run.goodput))
    if ending.failure is not None:
        if ending.is_saved:
            say(f"{run.directory} is saved at step {ending.step}")
        raise ending.failure
    if ending.signal:
        where = f"{run.directory} is saved at step {ending.step}"
        print(f"stopped by a signal; {where}", file=sys.stderr)
        sys.exit(128 + ending.signal)
    say(f"{run.directory}: finished at step {ending.step}")
