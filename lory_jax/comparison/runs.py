"""What a finished run holds for a comparison, and whether runs can be compared."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lory_jax.analysis.routing import ANALYSIS
from lory_jax.errors import InputError
from lory_jax.model.config import ModelConfig
from lory_jax.run.directory import model_config, read_config, read_metrics


@dataclass(frozen=True)
class FinishedRun:
    """What a run directory holds about its run.

    Attributes:
      workdir: the run directory.
      config: the config, section by section.
      model_config: its section `model`.
      metrics: the lines of metrics.jsonl.
      evaluation: what the verb `evaluate` wrote.
      analysis: what the verb `analyze` wrote; None for a dense model.
    """

    workdir: Path
    config: dict[str, Any]
    model_config: ModelConfig
    metrics: list[dict[str, Any]]
    evaluation: dict[str, Any]
    analysis: dict[str, Any] | None


def read_finished_run(workdir: Path) -> FinishedRun:
    """Reads a finished run; `InputError` names the verb that must be run first."""
    metrics, trained = read_metrics(workdir), model_config(workdir)
    if not metrics:
        raise InputError(f"{workdir}: no step has been trained yet")
    step = metrics[-1]["step"]
    evaluation = _read_result(workdir / "evaluation.json", "evaluate", step)
    analysis = None
    if trained.num_experts:
        analysis = _read_result(workdir / "analysis" / ANALYSIS, "analyze", step)
    return FinishedRun(workdir, read_config(workdir), trained, metrics, evaluation, analysis)


def _read_result(path: Path, verb: str, step: int) -> dict[str, Any]:
    """What a verb wrote about a run that is at `step`."""
    try:
        result = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: missing; run the verb {verb} on this run first") from None
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error}); run the verb {verb} again") from None
    if result["step"] != step:
        raise InputError(
            f"{path}: written at step {result['step']}, but the run is at step {step}; run the "
            f"verb {verb} again"
        )
    return result


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
