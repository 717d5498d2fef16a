"""Losses and perplexities of a trained model on sets of instances.

Letters: N instances, L sequence, T tokens per segment.
"""

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from lory_jax.api import Model
from lory_jax.console import progress
from lory_jax.errors import InputError
from lory_jax.evaluation.held_out import batches_of
from lory_jax.evaluation.perplexity import (
    instance_losses,
    losses_of_tokens,
    standard_error,
    summarize,
)
from lory_jax.evaluation.tables import MEASURES
from lory_jax.parallel import make_mesh
from lory_jax.run.directory import RunDirectory
from lory_jax.training.step import make_loss_step


class Losses(NamedTuple):
    """Losses in nats of every domain, `[N, L]`.

    Attributes:
      training: routed as in training.
      scored: routed as was asked for; the same array where both agree.
      routed_by: the name of that routing; None for a dense model.
      seconds: what it took to measure them.
    """

    training: dict[str, np.ndarray]
    scored: dict[str, np.ndarray]
    routed_by: str | None
    seconds: float

    def of_instances(self, first_position: int) -> dict[str, np.ndarray]:
        """The mean loss of every instance from a position on, float32 `[N]` by domain."""
        return {d: instance_losses(nll, first_position) for d, nll in self.scored.items()}


class EvaluatedModel(NamedTuple):
    """A trained model and how it is evaluated.

    Attributes:
      run: where it comes from.
      mesh: what it is spread over.
      batch_size: how many rows are read at a time.
      scored_from: the first position that is scored; None for T.
    """

    run: RunDirectory
    model: Model
    mesh: jax.sharding.Mesh
    batch_size: int
    scored_from: int | None = None

    @property
    def first_position(self) -> int:
        """The first position that is scored."""
        T = self.model.config.segment_length
        return T if self.scored_from is None else self.scored_from

    def replace(self, **fields: Any) -> "EvaluatedModel":
        """The same parameters under a model config that differs in these fields."""
        old = self.model
        config = dataclasses.replace(old.config, **fields)
        return self._replace(model=Model(config, old.params, old.tokenizer, old.step))

    def with_segment_length(self, T: int) -> "EvaluatedModel":
        """The same model with segments of another length (`Model.with_segment_length`)."""
        return self._replace(model=self.model.with_segment_length(T))


def open_model(run: RunDirectory, batch_size: int | None = None) -> EvaluatedModel:
    """Loads the chosen checkpoint of a run.

    Args:
      run: the run and its checkpoint.
      batch_size: rows at a time over all devices; None is the batch size of training.

    Raises:
      InputError: the run has no such checkpoint, or the batch does not divide over the devices.
    """
    mesh = make_mesh(data=1, fsdp=0, tensor=1)
    trained = run.load_params(mesh)
    batch_size = batch_size or run.train_config["global_batch_size"]
    if batch_size % jax.device_count():
        raise InputError(
            f"batch_size: got {batch_size}, must be a multiple of the {jax.device_count()} devices"
        )
    model = Model(trained.model_config, trained.params, run.tokenizer, trained.step)
    return EvaluatedModel(run, model, mesh, batch_size)


def evaluate_run(
    run: RunDirectory,
    routing: str | None = None,
    data: Path | None = None,
    split: str = "test",
    batch_size: int | None = None,
) -> dict[str, Any]:
    """Measures the chosen checkpoint of a run on its held-out documents.

    Args:
      run: the run and its checkpoint.
      routing: "segment" or "prompt"; None routes positions >= T as in training.
      data: where its prepared data are, if they were moved.
      split: "test", "validation" or "confirmation".
      batch_size: instances at a time over all devices.
    """
    evaluated, prepared = open_model(run, batch_size), run.open_data(data)
    sets, origins = prepared.held_out_with_instances(split), prepared.held_out_origins(split)
    return summarize_losses(evaluated, sets, measure_losses(evaluated, sets, routing), origins)


def measure(
    evaluated: EvaluatedModel, sets: dict[str, np.ndarray], routing: str | None = None
) -> dict[str, Any]:
    """Measures a model on the instances of every domain: `summarize_losses(measure_losses(...))`.

    Args:
      evaluated: the model.
      sets: instances by domain, int32 `[N, L + 1]`.
      routing: "segment" or "prompt"; None routes positions >= T as in training.

    Raises:
      InputError: no position is >= T.
    """
    return summarize_losses(evaluated, sets, measure_losses(evaluated, sets, routing))


def summarize_losses(
    evaluated: EvaluatedModel,
    sets: dict[str, np.ndarray],
    found: Losses,
    origins: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, Any]:
    """Every one of `MEASURES` by domain, their geometric means, and how they were measured.

    `origins` are those of the instances of every domain; None counts each as one of its own.
    """
    model, first = evaluated.model, evaluated.first_position
    training, scored = found.training, found.scored
    by_domain: dict[str, dict[str, Any]] = {}
    for domain, rows in sets.items():
        everywhere = summarize(training[domain], rows, model.tokenizer.token_bytes, first)
        by_domain[domain] = summarize(scored[domain], rows, model.tokenizer.token_bytes, first) | {
            "perplexity_all_positions": everywhere["perplexity_all_positions"],
            "standard_error": standard_error(
                scored[domain], first, None if origins is None else origins[domain]
            ),
        }
    result: dict[str, Any] = {
        name: {domain: values[name] for domain, values in by_domain.items()}
        for name in (*MEASURES, "standard_error")
    }
    result["geometric_mean"] = {
        name: geometric_mean(list(result[name].values())) for name in MEASURES if sets
    }
    return result | {
        "routing": found.routed_by,
        "instances": {domain: len(rows) for domain, rows in sets.items()},
        "step": model.step,
        "seconds": found.seconds,
    }


def measure_losses(
    evaluated: EvaluatedModel, sets: dict[str, np.ndarray], routing: str | None = None
) -> Losses:
    """Losses of every token, routed as in training and as `routing` asks (see `measure`).

    Raises:
      InputError: no position is >= T, or the first that is to be scored is none of these.
    """
    start = time.perf_counter()
    config = evaluated.model.config
    if sets and config.sequence_length <= config.segment_length:
        raise InputError(
            f"{evaluated.run}: its instances of {config.sequence_length} tokens are a single "
            "segment, so there are no positions >= T to score"
        )
    if sets and not config.segment_length <= evaluated.first_position < config.sequence_length:
        raise InputError(
            f"first_position: got {evaluated.first_position}, must be at least "
            f"{config.segment_length}, the length of a segment, and below "
            f"{config.sequence_length}, the length of an instance"
        )
    found = _both_losses(evaluated, sets, routing)
    return Losses(*found, time.perf_counter() - start)


def _both_losses(
    evaluated: EvaluatedModel, sets: dict[str, np.ndarray], routing: str | None
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], str | None]:
    """Losses routed as in training, losses routed by `routing`, and the name of that routing."""
    config, trained_routing = evaluated.model.config, as_trained(evaluated)
    routing = routing or trained_routing
    training = losses(evaluated, sets, "evaluating", config.measured_routing)
    if not config.num_experts:
        return training, training, None
    # Where tokens are routed one by one, a prompt decides nothing.
    if config.routes_tokens:
        return training, training, "token"
    # With the first segment as the prompt, positions >= T are routed as in training: one pass
    # serves both.
    if routing == trained_routing:
        return training, training, routing
    label = f"evaluating, routed by {routing}"
    return training, losses(evaluated, sets, label, routing), routing


def losses(
    evaluated: EvaluatedModel, sets: dict[str, np.ndarray], label: str, routing: str | None
) -> dict[str, np.ndarray]:
    """Losses in nats of every domain, `[N, L]`, batch by batch, with a progress line.

    `routing` "segment" and "prompt" use the first T tokens of every row as its prompt; None routes
    exactly as in training.
    """
    if not sets:
        return {}
    config, params = evaluated.model.config, evaluated.model.params
    mesh, batch_size = evaluated.mesh, evaluated.batch_size
    loss_step = make_loss_step(config, mesh, routing, prompt_length=config.segment_length)
    batches = batches_of(sets, batch_size)
    found: dict[str, list[np.ndarray]] = {domain: [] for domain in sets}
    with jax.set_mesh(mesh):
        for domain, rows in progress(batches, len(batches), label, "batches"):
            found[domain].append(
                losses_of_tokens(loss_step, params, rows, batch_size, mesh, config.batch_axis)
            )
    return {domain: np.concatenate(parts) for domain, parts in found.items()}


def as_trained(evaluated: EvaluatedModel) -> str:
    """The routing at inference that equals that of training on positions >= T."""
    return "prompt" if evaluated.model.config.routing == "prefix" else "segment"


def geometric_mean(values: list[float]) -> float:
    """The geometric mean of positive values."""
    return math.exp(math.fsum(math.log(value) for value in values) / len(values))
