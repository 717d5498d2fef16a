"""What a finished run holds for a comparison, and whether runs can be compared."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lory_jax.analysis.routing import ANALYSIS
from lory_jax.errors import InputError
from lory_jax.evaluation.tables import MEASURES
from lory_jax.json_text import parse_object
from lory_jax.model.config import ModelConfig
from lory_jax.run.directory import RunDirectory
from lory_jax.run.step_choice import NEWEST

FACTS = ("geometric_mean", "instances", "routing", "seconds", "split", "step", "tasks")
EVALUATION_KEYS = (*MEASURES, *FACTS)
ANALYSIS_KEYS = ("origins", "routing_distance", "routing_weights", "step", "utilisation")


@dataclass(frozen=True)
class FinishedRun:
    """What a run directory holds about its run.

    Attributes:
      directory: the run directory.
      config: the config, section by section.
      model_config: its section `model`.
      metrics: the lines of metrics.jsonl.
      evaluation: what the command `evaluate` wrote.
      analysis: what the command `analyze` wrote; None for a dense model.
    """

    directory: RunDirectory
    config: dict[str, Any]
    model_config: ModelConfig
    metrics: list[dict[str, Any]]
    evaluation: dict[str, Any]
    analysis: dict[str, Any] | None


def read_finished_run(run: RunDirectory) -> FinishedRun:
    """Reads a finished run; `InputError` names the command that must be run first."""
    metrics, trained = run.read_metrics(), run.model_config
    if not metrics:
        raise InputError(f"{run}: no step has been trained yet")
    evaluation = _read_result(run.evaluation_file, "evaluate", EVALUATION_KEYS)
    # The best checkpoint, or one chosen by number, may be older than the last step.
    if evaluation.get("checkpoint", NEWEST) == NEWEST:
        _check_step(run.evaluation_file, "evaluate", evaluation, metrics[-1]["step"], "trained")
    analysis = None
    if trained.num_experts:
        path = run.analysis / ANALYSIS
        analysis = _read_result(path, "analyze", ANALYSIS_KEYS)
        _check_step(path, "analyze", analysis, evaluation["step"], "evaluated")
    return FinishedRun(run, run.config, trained, metrics, evaluation, analysis)


def _check_step(path: Path, verb: str, result: dict[str, Any], step: int, was: str) -> None:
    if result["step"] != step:
        raise InputError(
            f"{path}: written at step {result['step']}, but the run was {was} at step {step}; run "
            f"{verb} again with step={step}"
        )


def _read_result(path: Path, verb: str, keys: Sequence[str]) -> dict[str, Any]:
    """What a command wrote about a run, with all of these keys."""
    try:
        found = parse_object(path.read_bytes(), path)
        if missing := [key for key in keys if key not in found]:
            raise InputError(f"{path}: has no {missing[0]}")
        return found
    except FileNotFoundError:
        raise InputError(f"{path}: missing; run {verb} on this run first") from None
    except InputError as error:
        raise InputError(f"{error}; run {verb} again") from None


def check_comparable(runs: Mapping[str, FinishedRun]) -> None:
    """Raises `InputError` unless all runs were evaluated on the same instances."""
    first_name, first = next(iter(runs.items()))
    for name, run in runs.items():
        for key in ("split", "instances"):
            if run.evaluation[key] != first.evaluation[key]:
                raise InputError(
                    f"{name}: evaluated on {key} {run.evaluation[key]}, but {first_name} on "
                    f"{first.evaluation[key]}; evaluate both on the same prepared data"
                )
