"""Compares finished runs in one report: the figures as JSON, and a page with pictures.

    python -m lory_jax.compare dense=runs/local/dense lory=runs/local/lory --out=runs/local/report
    python -m lory_jax.compare runs/local/dense runs/local/lory

Writes OUT.json and OUT.html from what `train`, `evaluate` (RUN_DIR/evaluation.json) and `analyze`
(RUN_DIR/analysis) left in each run directory: perplexity, tasks, loss curves, utilisation, FLOPs
and time. The first run is the baseline of the others; for each, the report says how many training
tokens it needed to reach the final validation loss of the first.
"""

import argparse
import json
from pathlib import Path

from lory_jax import cli
from lory_jax.errors import ConfigError
from lory_jax.storage import check_writable, local_path, storage_path, write_atomically


def main(argv: list[str]) -> None:
    parser = cli.Parser("compare", __doc__)
    add = parser.add_argument
    add(
        "runs",
        nargs="+",
        metavar="[NAME=]RUN_DIR",
        help="a run directory and the name of its run (default: the directory's own name)",
    )
    add(
        "--out",
        type=local_path,
        default=Path("comparison"),
        help="path without suffix; writes OUT.json and OUT.html (default: comparison)",
    )
    add(
        "--data",
        type=local_path,
        metavar="DIR",
        help="where the prepared data are, if they were moved",
    )
    write_report(parser.parse(argv))


def write_report(args: argparse.Namespace) -> None:
    """Reads the runs, compares them, and writes the report."""
    workdirs = named_directories(args.runs)
    json_path, html_path = (Path(f"{args.out}{suffix}") for suffix in (".json", ".html"))
    check_writable(json_path, "out")

    # Imported here so that --help and flag errors do not wait for JAX and matplotlib.
    from lory_jax.comparison.figures import compare_runs, headline
    from lory_jax.comparison.runs import check_comparable, read_finished_run
    from lory_jax.comparison.samples import draw_samples
    from lory_jax.report.comparison import comparison_page
    from lory_jax.run.directory import RunDirectory

    runs = {name: read_finished_run(RunDirectory(workdir)) for name, workdir in workdirs.items()}
    check_comparable(runs)
    data = next(iter(runs.values())).directory.open_data(args.data)

    report = compare_runs(runs, data)
    report["samples"] = draw_samples(runs, data)
    page = comparison_page(
        report,
        {name: run.metrics for name, run in runs.items()},
        {name: run.analysis for name, run in runs.items() if run.analysis},
    )
    print(headline(report))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(json_path, json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    write_atomically(html_path, page)
    print(f"figures: {json_path}\nreport:  {html_path}")


def named_directories(items: list[str]) -> dict[str, Path]:
    """Run directories by name, from `NAME=RUN_DIR` or `RUN_DIR`."""
    workdirs: dict[str, Path] = {}
    for item in items:
        name, equals, path = item.rpartition("=")
        name = name if equals else Path(path).name
        if not (name and path):
            raise ConfigError(f"runs: got {item!r}, must be NAME=RUN_DIR or RUN_DIR")
        if name in workdirs:
            raise ConfigError(f"runs: got the name {name!r} twice; tell them apart with NAME=")
        workdirs[name] = storage_path(path)
    return workdirs


if __name__ == "__main__":
    cli.run(main)
