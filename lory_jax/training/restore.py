"""Where a training process starts: at a checkpoint, from another run, or from scratch."""

from collections.abc import Mapping
from dataclasses import dataclass

from lory_jax.console import say
from lory_jax.run.phases import phase_config
from lory_jax.training.initialization_from import state_from
from lory_jax.training.phases import Phase
from lory_jax.training.setup import Setup
from lory_jax.training.state import State, abstract_state, init_state


@dataclass
class Position:
    """Where a run is. The loop moves it; nothing else refers to the state, so it can be freed.

    Attributes:
      step: completed steps, which is also the data position.
      counts: `LossWatch.counts` when the process started.
    """

    state: State
    phase: Phase
    step: int
    counts: Mapping[str, int] | None = None


def restore_or_initialize(run: Setup) -> Position:
    """The position at which the loop starts."""
    # 1. The newest intact checkpoint of this run.
    # 2. The parameters of `init_from`.
    # 3. Scratch.
    # Damaged checkpoints raise: 2 or 3 would overwrite a run that someone may still repair.
    return _restored(run) or _initialized_from(run) or _from_scratch(run)


def _restored(run: Setup) -> Position | None:
    restored = run.checkpoints.restore_newest(
        lambda meta: abstract_state(
            phase_config(run.model_config, meta["phase"]), run.optimizer, run.mesh
        )
    )
    if restored is None:
        return None
    state, meta = restored
    run.goodput.resume(meta.get("goodput", {}))
    say(f"resuming {run.directory} at step {meta['step']} of {run.config.train.steps}")
    return Position(state, run.phases.named(meta["phase"]), meta["step"], meta.get("watch"))


def _initialized_from(run: Setup) -> Position | None:
    if not run.init_from:
        return None
    train = run.config.train
    state, phase = state_from(
        run.init_from,
        run.model_config,
        run.optimizer,
        run.mesh,
        train.seed,
        train.upcycle_redraw,
    )
    say(f"starting from {', '.join(map(str, run.init_from))}")
    return Position(state, run.phases.named(phase), 0)


def _from_scratch(run: Setup) -> Position:
    phase = run.phases.first()
    state = init_state(phase.model_config, run.optimizer, run.mesh, run.config.train.seed)
    return Position(state, phase, 0)
