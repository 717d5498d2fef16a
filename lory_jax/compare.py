"""Compares finished runs in one report: figures as JSON, and a page with the pictures.

    python -m lory_jax.compare dense=runs/local/dense lory=runs/local/lory --out=runs/local/report
    python -m lory_jax.compare runs/local/dense runs/local/lory

Writes OUT.json and OUT.html from what `evaluate` (W/evaluation.json), `analyze` (W/analysis) and
`train` left in each work directory W: perplexity, tasks, loss curves, utilisation, FLOPs, time, and
the training tokens until the final validation loss of the first run, with which the others are
compared.
"""

import json
import os
import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lory_jax import api, cli
from lory_jax.analyze import ANALYSIS
from lory_jax.errors import InputError
from lory_jax.evaluation.held_out import held_out_sets
from lory_jax.evaluation.tables import MEASURES
from lory_jax.model.config import ModelConfig
from lory_jax.model.flops import flops_per_token, parameter_counts
from lory_jax.report.comparison import comparison_page, percent
from lory_jax.run.directory import (
    data_directory,
    model_config,
    read_config,
    read_metrics,
    write_atomically,
)
from lory_jax.run.step_choice import NEWEST

VERSIONED = ("lory_jax", "jax", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "tokenizers")


@dataclass(frozen=True)
class Run:
    """What a work directory holds about its run; `analysis` is None for a dense model."""

    workdir: Path
    config: dict[str, Any]
    model: ModelConfig
    metrics: list[dict[str, Any]]
    evaluation: dict[str, Any]
    analysis: dict[str, Any] | None


def main(argv: list[str]) -> None:
    parser = cli.Parser("compare", __doc__)
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="[NAME=]W",
        help="a name and its work directory, whose own name it is if none is given",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("comparison"),
        help="path without suffix: OUT.json and OUT.html (default: comparison)",
    )
    parser.add_argument("--data", type=Path, metavar="DIR", help="where the prepared data are now")
    args = parser.parse(argv)
    workdirs: dict[str, Path] = {}
    for item in args.runs:
        name, equals, path = item.rpartition("=")
        name = name if equals else Path(path).name
        if not (name and path) or name in workdirs:
            parser.error(f"runs: got {item!r}, takes NAME=W or W, each name once")
        workdirs[name] = Path(path)
    runs = {name: read_run(workdir) for name, workdir in workdirs.items()}
    check_comparable(runs)
    data = data_directory(next(iter(runs.values())).workdir, args.data)

    report = summarize_runs(runs, data)
    report["samples"] = draw_samples(runs, data)
    page = comparison_page(
        report,
        {name: run.metrics for name, run in runs.items()},
        {name: run.analysis for name, run in runs.items() if run.analysis},
    )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    json_path, html_path = (Path(f"{args.out}{suffix}") for suffix in (".json", ".html"))
    write_atomically(json_path, json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    write_atomically(html_path, page)
    print(headline(report))
    print(f"figures: {json_path}\nreport:  {html_path}")


def read_run(workdir: Path) -> Run:
    """Reads a finished run; `InputError` names the verb that is still to be run."""
    metrics, model = read_metrics(workdir), model_config(workdir)
    if not metrics:
        raise InputError(f"{workdir}: no step was trained yet")
    step = metrics[-1]["step"]
    evaluation = _read_result(workdir / "evaluation.json", "evaluate", workdir, step)
    analysis = None
    if model.num_experts:
        path = workdir / "analysis" / ANALYSIS
        analysis = _read_result(path, "analyze", workdir, step, evaluation["step"])
    return Run(workdir, read_config(workdir), model, metrics, evaluation, analysis)


def _read_result(
    path: Path, verb: str, workdir: Path, last_step: int, step: int | None = None
) -> dict[str, Any]:
    """What a verb wrote, which must be of `step`; if None, of the step that the verb was told.

    A verb that was told no step used the newest, which must still be the last step.
    """
    command = f"python -m lory_jax.{verb} --workdir={workdir}"
    if step not in (None, last_step):
        command += f" --step={step}"
    if verb == "evaluate":
        command += f" --out={path}"
    try:
        result = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: missing; make it with {command}") from None
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error}); make it again with {command}") from None
    if step is None:
        step = last_step if result.get("checkpoint", NEWEST) == NEWEST else result["step"]
    if result["step"] != step:
        wanted = f"the run is at step {step}"
        if step != last_step:
            wanted = f"the run was evaluated at step {step}"
        raise InputError(
            f"{path}: made at step {result['step']}, {wanted}; make it again with {command}"
        )
    return result


def check_comparable(runs: dict[str, Run]) -> None:
    """Raises `InputError` unless all runs were evaluated on the same instances."""
    first_name, first = next(iter(runs.items()))
    for name, run in runs.items():
        for key in ("split", "instances"):
            if run.evaluation[key] != first.evaluation[key]:
                raise InputError(
                    f"{name}: evaluated on {key} {run.evaluation[key]}, {first_name} on "
                    f"{first.evaluation[key]}; evaluate both on the same prepared data"
                )


def summarize_runs(runs: dict[str, Run], data: Path) -> dict[str, Any]:
    """The report without its samples: everything by measure, then by name of the run."""
    report: dict[str, Any] = {
        measure: {name: run.evaluation[measure] for name, run in runs.items()}
        for measure in MEASURES
    }
    report["geometric_mean"] = {
        measure: {name: run.evaluation["geometric_mean"][measure] for name, run in runs.items()}
        for measure in MEASURES
    }
    report["models"] = {name: _describe(run) for name, run in runs.items()}
    report["tasks"] = task_figures({name: run.evaluation["tasks"] for name, run in runs.items()})
    report["seconds"] = {
        name: {
            "training": sum(line["step_seconds"] for line in run.metrics),
            "evaluation": run.evaluation["seconds"],
        }
        for name, run in runs.items()
    }
    target = final_validation_loss(next(iter(runs.values())).metrics)
    report["tokens_to_first_loss"] = {
        name: tokens_to_reach(run.metrics, target) for name, run in runs.items()
    }
    report["against_first"] = differences(report)
    timings = data / "timings.json"
    if timings.is_file():
        report["seconds"]["prepare"] = json.loads(timings.read_text("utf-8"))
    report["routing_distance"] = {
        name: run.analysis["routing_distance"] for name, run in runs.items() if run.analysis
    }
    report["test"] = {
        key: next(iter(runs.values())).evaluation[key] for key in ("split", "instances")
    }
    report["versions"] = _versions()
    return report


def _describe(run: Run) -> dict[str, Any]:
    last, train = run.metrics[-1], run.config["train"]
    dropped = [line["dropped_tokens"] for line in run.metrics if "dropped_tokens" in line]
    return {
        "parameters": parameter_counts(run.model),
        "flops_per_token": flops_per_token(run.model),
        "experts_active": last["experts_active"],
        "expert_pairs": run.model.num_layers * run.model.num_experts,
        "dropped_tokens": sum(dropped) / len(dropped) if dropped else None,
        "num_experts": run.model.num_experts,
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


def final_validation_loss(metrics: list[dict[str, Any]]) -> float | None:
    """The last validation loss of a run, None before its first validation."""
    found = [line["validation_loss"] for line in metrics if "validation_loss" in line]
    return found[-1] if found else None


def tokens_to_reach(metrics: list[dict[str, Any]], target: float | None) -> float | None:
    """Training tokens until the validation loss was first at or below `target`; None if never.

    Between two validations the loss is taken to fall along a line.
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


def task_figures(tasks: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """The metric to report of every task that all runs were asked: `{task: {run: figure}}`."""
    first, *others = tasks.values()
    shared = [
        task for task in first if first[task]["metric"] and all(task in other for other in others)
    ]
    return {
        task: {name: found[task][found[task]["metric"]] for name, found in tasks.items()}
        for task in shared
    }


def differences(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Every run but the first against it: ratios minus 1, and differences of the tasks' figures."""
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


def _versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": str(os.cpu_count()),
    } | {package: version(package) for package in VERSIONED}


def draw_samples(runs: dict[str, Run], data: Path) -> dict[str, Any]:
    """One continuation per domain by the first run with experts (or else the first run).

    The prompt is the beginning of a test document, about T tokens; experts are merged once, by it.
    """
    name = next((name for name, run in runs.items() if run.model.num_experts), next(iter(runs)))
    model = api.load(runs[name].workdir, runs[name].evaluation["step"])
    T, L = model.config.segment_length, model.config.sequence_length
    prompts = {
        domain: model.tokenizer.decode_bytes(
            document_beginning(rows, model.tokenizer.bos_id, model.tokenizer.eos_id, min(T, L // 2))
        ).decode("utf-8", "ignore")
        for domain, rows in held_out_sets(data, "test").items()
    }
    longest = max(len(model.tokenizer.encode(prompt)) for prompt in prompts.values())
    settings: dict[str, Any] = {
        "max_new_tokens": min(128, L - longest - 1),
        "temperature": 0.8,
        "top_p": 0.95,
    }
    texts = model.generate(list(prompts.values()), routing="prompt", **settings)
    return {
        "run": name,
        "settings": settings,
        "texts": {
            domain: {"prompt": prompt, "continuation": text}
            for (domain, prompt), text in zip(prompts.items(), texts, strict=True)
        },
    }


def document_beginning(rows: Any, bos_id: int, eos_id: int, length: int) -> list[int]:
    """The first `length` tokens of the first document in `rows` that is so long, without BOS.

    Without such a document it is the longest beginning there is; without any BOS, that of row 1.
    """
    longest: list[int] = []
    for row in rows.tolist():
        starts = [i + 1 for i, token in enumerate(row) if token == bos_id]
        for start in starts:
            tokens = row[start : start + length]
            if eos_id in tokens:
                tokens = tokens[: tokens.index(eos_id)]
            if len(tokens) == length:
                return tokens
            longest = max(longest, tokens, key=len)
    return longest or rows[0, :length].tolist()


def headline(report: dict[str, Any]) -> str:
    """Geometric mean and perplexity per domain of every run, as an aligned table."""
    perplexity = report["perplexity"]
    first, *others = perplexity
    rows = [("", *perplexity, *others)]
    domains = list(perplexity[first])
    for row in (*domains, "geometric mean"):
        source = {
            name: values | {"geometric mean": report["geometric_mean"]["perplexity"][name]}
            for name, values in perplexity.items()
        }
        figures = [source[name][row] for name in perplexity]
        differences = [percent(value / figures[0] - 1) for value in figures[1:]]
        rows.append((row, *(f"{value:.3f}" for value in figures), *differences))
    training = [report["seconds"][name]["training"] for name in perplexity]
    times = [percent(value / training[0] - 1) for value in training[1:]]
    rows.append(("training, seconds", *(f"{value:.0f}" for value in training), *times))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            f"{cell:<{width}}" if column == 0 else f"{cell:>{width}}"
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    title = "perplexity on test documents, positions >= T"
    return "\n".join([title + (f" (last columns: against {first})" if others else ""), *lines])


if __name__ == "__main__":
    cli.run(main)
