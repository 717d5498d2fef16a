"""The figures of a comparison: everything by measure, then by the name of the run."""

import json
import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from lory_jax.comparison.runs import FinishedRun
from lory_jax.data.prepared import PreparedData
from lory_jax.evaluation.tables import MEASURES
from lory_jax.model.flops import flops_per_token, parameter_counts
from lory_jax.report.comparison import percent

VERSIONED = ("lory_jax", "jax", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "tokenizers")

Metrics = Sequence[Mapping[str, Any]]


def compare_runs(runs: Mapping[str, FinishedRun], data: PreparedData) -> dict[str, Any]:
    """The report without its samples.

    Args:
      runs: by name; the others are compared with the first.
      data: the prepared data, which record how long their preparation took.
    """
    report: dict[str, Any] = {
        measure: {name: run.evaluation[measure] for name, run in runs.items()}
        for measure in MEASURES
    }
    report["geometric_mean"] = {
        measure: {name: run.evaluation["geometric_mean"][measure] for name, run in runs.items()}
        for measure in MEASURES
    }
    report["models"] = {name: describe_run(run) for name, run in runs.items()}
    report["tasks"] = task_figures({name: run.evaluation["tasks"] for name, run in runs.items()})
    report["seconds"] = {
        name: {
            "training": sum(line["step_seconds"] for line in run.metrics),
            "evaluation": run.evaluation["seconds"],
        }
        for name, run in runs.items()
    }
    first = next(iter(runs.values()))
    target = final_validation_loss(first.metrics)
    report["tokens_to_first_loss"] = {
        name: tokens_to_reach(run.metrics, target) for name, run in runs.items()
    }
    report["against_first"] = differences_from_first(report)
    timings = data.directory / "timings.json"
    if timings.is_file():
        report["seconds"]["prepare"] = json.loads(timings.read_text("utf-8"))
    report["routing_distance"] = {
        name: run.analysis["routing_distance"] for name, run in runs.items() if run.analysis
    }
    report["test"] = {key: first.evaluation[key] for key in ("split", "instances")}
    report["versions"] = versions()
    return report


def describe_run(run: FinishedRun) -> dict[str, Any]:
    """Size, cost and settings of a run."""
    last, train = run.metrics[-1], run.directory.train_config
    dropped = [line["dropped_tokens"] for line in run.metrics if "dropped_tokens" in line]
    return {
        "parameters": parameter_counts(run.model_config),
        "flops_per_token": flops_per_token(run.model_config),
        "experts_active": last["experts_active"],
        "expert_pairs": len(run.model_config.layer_numbers) * run.model_config.num_experts,
        "dropped_tokens": sum(dropped) / len(dropped) if dropped else None,
        "num_experts": run.model_config.num_experts,
        "steps": last["step"],
        "evaluated_step": run.evaluation["step"],
        "tokens": last["tokens"],
        "learning_rate": train["learning_rate"],
        "global_batch_size": train["global_batch_size"],
        "seed": train["seed"],
        "validation_loss": final_validation_loss(run.metrics),
        "routing_at_evaluation": run.evaluation["routing"],
        "model": run.config["model"],
    }


def final_validation_loss(metrics: Metrics) -> float | None:
    """The last validation loss of a run; None if it was never validated."""
    found = [line["validation_loss"] for line in metrics if "validation_loss" in line]
    return found[-1] if found else None


def tokens_to_reach(metrics: Metrics, target: float | None) -> float | None:
    """Training tokens until the validation loss was first at or below `target`; None if never.

    Between two validations the loss is interpolated linearly.
    """
    before: tuple[float, float] | None = None
    for line in metrics:
        if "validation_loss" not in line or target is None:
            continue
        tokens, loss = float(line["tokens"]), line["validation_loss"]
        if loss <= target:
            if before is None or before[1] == loss:
                return tokens
            share = (before[1] - target) / (before[1] - loss)
            return before[0] + share * (tokens - before[0])
        before = tokens, loss
    return None


def task_figures(tasks: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """The main metric of every task that all runs were evaluated on: `{task: {run: figure}}`."""
    first, *others = tasks.values()
    shared = [
        task for task in first if first[task]["metric"] and all(task in other for other in others)
    ]
    return {
        task: {name: found[task][found[task]["metric"]] for name, found in tasks.items()}
        for task in shared
    }


def differences_from_first(report: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """How every other run differs from the first: ratios minus 1; for tasks, plain differences."""
    first, *others = report["models"]

    def ratio(value: float | None, base: float | None) -> float | None:
        return value / base - 1 if value is not None and base else None

    measures = {
        "perplexity": report["geometric_mean"]["perplexity"],
        "active_parameters": {n: m["parameters"]["active"] for n, m in report["models"].items()},
        "flops_per_token": {n: m["flops_per_token"] for n, m in report["models"].items()},
        "training_seconds": {n: seconds["training"] for n, seconds in report["seconds"].items()},
        "tokens_to_first_loss": report["tokens_to_first_loss"],
    }
    return {
        name: {key: ratio(values[name], values[first]) for key, values in measures.items()}
        | {"tasks": {task: row[name] - row[first] for task, row in report["tasks"].items()}}
        for name in others
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that affect the figures, and what the machine is."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": str(os.cpu_count()),
    } | {package: version(package) for package in VERSIONED}


def headline(report: Mapping[str, Any]) -> str:
    """Perplexity of every run by domain, their geometric mean and the training time, as a table."""
    perplexity = report["perplexity"]
    first, *others = perplexity

    def row(label: str, values: Sequence[float], digits: int) -> tuple[str, ...]:
        changes = [percent(value / values[0] - 1) for value in values[1:]]
        return (label, *(f"{value:.{digits}f}" for value in values), *changes)

    rows = [("", *perplexity, *others)]
    for domain in perplexity[first]:
        rows.append(row(domain, [perplexity[name][domain] for name in perplexity], 3))
    means = report["geometric_mean"]["perplexity"]
    rows.append(row("geometric mean", [means[name] for name in perplexity], 3))
    times = [report["seconds"][name]["training"] for name in perplexity]
    rows.append(row("training, seconds", times, 0))

    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for label, *cells in rows:
        right = [f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join([f"{label:<{widths[0]}}", *right]).rstrip())
    title = "perplexity of test documents, positions >= T"
    if others:
        title += f" (last columns: change from {first})"
    return "\n".join([title, *lines])
