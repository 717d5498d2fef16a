"""Compares finished runs in one report: figures as JSON, and a page with the pictures.

    python -m lory_jax.compare dense=runs/local/dense lory=runs/local/lory --out=runs/local/report

Writes OUT.json and OUT.html from what `evaluate` (W/evaluation.json), `analyze` (W/analysis) and
`train` left in each work directory W. The first run is the one that the others are compared with.
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
from lory_jax.evaluate import MEASURES
from lory_jax.evaluation.sets import held_out_sets
from lory_jax.flops import parameter_counts
from lory_jax.model.transformer import ModelConfig
from lory_jax.report.comparison import comparison_page, percent
from lory_jax.training.workdir import (
    data_directory,
    model_config,
    read_config,
    read_metrics,
    write_atomically,
)

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
    parser.add_argument("runs", nargs="+", metavar="NAME=W", help="a name and its work directory")
    parser.add_argument(
        "--out", required=True, type=Path, help="path without suffix: OUT.json and OUT.html"
    )
    parser.add_argument("--data", type=Path, metavar="DIR", help="where the prepared data are now")
    args = parser.parse(argv)
    workdirs: dict[str, Path] = {}
    for item in args.runs:
        name, equals, path = item.partition("=")
        if not (name and equals and path) or name in workdirs:
            parser.error(f"runs: got {item!r}, takes NAME=W, each name once")
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
        analysis = _read_result(workdir / "analysis" / ANALYSIS, "analyze", workdir, step)
    return Run(workdir, read_config(workdir), model, metrics, evaluation, analysis)


def _read_result(path: Path, verb: str, workdir: Path, step: int) -> dict[str, Any]:
    command = f"python -m lory_jax.{verb} --workdir={workdir}"
    if verb == "evaluate":
        command += f" --out={path}"
    try:
        result = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: missing; make it with {command}") from None
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error}); make it again with {command}") from None
    if result["step"] != step:
        raise InputError(
            f"{path}: made at step {result['step']}, the run is at step {step}; make it again with "
            f"{command}"
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
    report["seconds"] = {
        name: {
            "training": sum(line["step_seconds"] for line in run.metrics),
            "evaluation": run.evaluation["seconds"],
        }
        for name, run in runs.items()
    }
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
    validations = [line for line in run.metrics if "validation_loss" in line]
    return {
        "parameters": parameter_counts(run.model),
        "num_experts": run.model.num_experts,
        "steps": last["step"],
        "tokens": last["tokens"],
        "learning_rate": train["learning_rate"],
        "global_batch_size": train["global_batch_size"],
        "seed": train["seed"],
        "validation_loss": validations[-1]["validation_loss"] if validations else None,
        "routing_at_evaluation": run.evaluation["routing"],
        "model": run.config["model"],
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
    model = api.load(runs[name].workdir)
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
