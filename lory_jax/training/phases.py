"""The two phases of a run: the dense warm-up, then the training of experts."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from lory_jax.model.config import ModelConfig
from lory_jax.run.phases import DENSE, EXPERTS, phase_config
from lory_jax.segment_schedule import SegmentSchedule
from lory_jax.training.optimizer import Optimizer
from lory_jax.training.state import State
from lory_jax.training.step import make_loss_step, make_norms, make_train_step
from lory_jax.training.top_k import top_k_schedule
from lory_jax.training.upcycle import make_upcycle


@dataclass(frozen=True)
class Phase:
    """One phase and its programs, which are compiled when they are first used.

    Attributes:
      batch_size: instances per step over all processes.
      train_steps: the training step of every segment length.
      lengths: which of them a step has.
      upcycle: makes the first state of the phase from the last one of the dense phase; None for a
        dense model.
    """

    name: str
    model_config: ModelConfig
    batch_size: int
    train_steps: Mapping[int, Callable[..., Any]]
    lengths: SegmentSchedule
    loss_step: Callable[..., Any]
    norms: Callable[..., Any]
    upcycle: Callable[[State], State] | None

    def train_step(self, step: int) -> Callable[..., Any]:
        """The program of the step after so many completed ones."""
        return self.train_steps[self.lengths.at(step)]


def count_dense_steps(config: ConfigDict) -> int:
    """How many steps train the dense model before it is upcycled; 0 for a dense run."""
    fraction = config.train.dense_warmup_fraction if config.model.num_experts else 0
    return round(fraction * config.train.steps)


class Phases:
    """Makes the phases of a run.

    Attributes:
      dense_steps: where the dense phase ends; 0 for a run without one.
    """

    def __init__(
        self, config: ConfigDict, model_config: ModelConfig, optimizer: Optimizer, mesh: Mesh
    ):
        """`model_config` is that of the run's last phase."""
        self._config, self._model_config = config, model_config
        self._optimizer, self._mesh = optimizer, mesh
        self.dense_steps = count_dense_steps(config)

    def first(self) -> Phase:
        """The phase that a run from scratch starts in."""
        return self.named(DENSE if self.dense_steps else EXPERTS)

    def named(self, name: str) -> Phase:
        """The phase DENSE or EXPERTS."""
        model_config, mesh = phase_config(self._model_config, name), self._mesh
        train, last = self._config.train, model_config.segment_length
        schedule = train.segment_schedule if model_config.num_experts else ""
        lengths = SegmentSchedule.of(schedule, last, train.steps)
        return Phase(
            name,
            model_config,
            train.global_batch_size,
            {T: self._train_step(self._with_length(model_config, T)) for T in lengths.lengths},
            lengths,
            make_loss_step(
                model_config, mesh, model_config.measured_routing, model_config.segment_length
            ),
            make_norms(model_config, mesh, train.microbatches),
            make_upcycle(
                model_config, self._optimizer, mesh, train.seed, redraw=train.upcycle_redraw
            )
            if model_config.num_experts
            else None,
        )

    def _with_length(self, model_config: ModelConfig, T: int) -> ModelConfig:
        """The model with another segment length, which may need another merged FFN."""
        if model_config.segment_length == T:
            return model_config
        fields = {**self._config.model, "segment_length": T}
        return ModelConfig.for_platform(fields, jax.default_backend())

    def _train_step(self, model_config: ModelConfig) -> Callable[..., Any]:
        train = self._config.train
        return make_train_step(
            model_config,
            self._optimizer,
            self._mesh,
            train.microbatches,
            top_k_schedule(model_config, train),
            train.top_k_gradient == "straight_through",
            round(train.threshold_warmup_fraction * train.steps),
        )

    def after(self, phase: Phase) -> Phase | None:
        """The phase that follows, or None after the last one."""
        is_last = phase.name == EXPERTS or not self._model_config.num_experts
        return None if is_last else self.named(EXPERTS)
