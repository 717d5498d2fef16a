"""Perplexity, bits per byte and downstream tasks of a trained model.

    python -m lory_jax.evaluate --workdir=W --out=F.json [--routing=segment|prompt]
    python -m lory_jax.evaluate --workdir=W --tasks=lory_paper [--limit=N] [--tasks_data=DIR]
    python -m lory_jax.evaluate --workdir=W --perplexity_sets=DIR
    python -m lory_jax.evaluate --workdir=W --top_k_experts=1,2,4 --leakage
    python -m lory_jax.evaluate --list_tasks
    python -m lory_jax.evaluate --tasks=lory_paper --fetch_tasks=DIR

Perplexity is of held-out documents, domain by domain. The headline counts positions >= T, where no
prediction has seen its future. Perplexity over all positions is always routed as in training, like
the paper's (sparse baselines: as at inference, where no token sees another). docs/evaluation.md has
the details.
"""

import argparse
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from lory_jax import cli
from lory_jax.console import duration
from lory_jax.errors import InputError
from lory_jax.evaluation import variants
from lory_jax.evaluation.held_out import held_out_sets
from lory_jax.evaluation.measure import Run, as_trained, losses, open_run
from lory_jax.evaluation.perplexity import summarize
from lory_jax.evaluation.text_sets import SAMPLES, read_sets, standard_error
from lory_jax.parallel import start_process
from lory_jax.report import plots
from lory_jax.run.directory import data_directory, write_atomically
from lory_jax.storage import storage_path

MEASURES = ("perplexity", "perplexity_all_positions", "bits_per_byte")
NO_SPLIT = "none"


def main(argv: list[str]) -> None:
    parser = cli.Parser("evaluate", __doc__)
    add = parser.add_argument
    add("--workdir", type=storage_path, help="a run of the verb train")
    add("--out", type=Path, metavar="F.json", help="file to write (default: W/evaluation.json)")
    add(
        "--routing",
        choices=("segment", "prompt"),
        help="positions >= T, with the first T tokens as the prompt (default: as the model was "
        "trained: segment, or prompt after prefix routing), and tasks (default: prompt)",
    )
    add("--data", type=storage_path, metavar="DIR", help="where the prepared data are now")
    add(
        "--split",
        choices=("test", "validation", NO_SPLIT),
        default="test",
        help="held-out documents; none leaves them out (default: test)",
    )
    add("--batch_size", type=int, help="rows at a time (default: as in training; tasks: 16)")
    add("--perplexity_sets", type=Path, metavar="DIR", help="DIR/NAME.jsonl, or text in DIR/NAME/")
    add(
        "--perplexity_samples",
        type=int,
        default=SAMPLES,
        metavar="N",
        help=f"at most N samples of L tokens from each of these sets (default: {SAMPLES:,})",
    )
    add(
        "--top_k_experts",
        metavar="K,...",
        default=(),
        type=_counts,
        help="also the perplexity when only the K experts of largest weight are merged, per K",
    )
    add(
        "--leakage",
        action="store_true",
        help="also what segment 1 gains by seeing its own mean, and a picture of loss by position",
    )
    add(
        "--tasks",
        metavar="A,B",
        help="lory_paper, tasks in it, others of lm-eval or files (task.yaml), separated by commas",
    )
    add("--include_path", type=Path, metavar="DIR", help="a directory of more task files (.yaml)")
    add("--limit", type=int, metavar="N", help="the first N documents of each task")
    add("--tasks_data", type=Path, metavar="DIR", help="documents of tasks (default: from the hub)")
    add("--fetch_tasks", type=Path, metavar="DIR", help="write the documents of --tasks, and end")
    add("--list_tasks", action="store_true", help="print the tasks of the paper, and end")
    args = parser.parse(argv)
    _check(parser, args)

    # ---- What needs no model -----------------------------------------------------------------
    if args.list_tasks:
        print(_tasks_module().list_tasks())
        return
    if args.fetch_tasks:
        _tasks_module().fetch_tasks(args.fetch_tasks, args.tasks or "lory_paper")
        return

    # ---- What goes in: all of it is read before anything long starts --------------------------
    start_process()
    start = time.perf_counter()
    run = open_run(args.workdir, args.batch_size)
    variants.check_variants(run, args.top_k_experts, args.leakage)
    held_out = {}
    if args.split != NO_SPLIT:
        held_out = held_out_sets(data_directory(args.workdir, args.data), args.split)
    own_sets = {}
    if args.perplexity_sets:
        own_sets = read_sets(
            args.perplexity_sets,
            run.model.tokenizer,
            run.model.config.sequence_length,
            args.perplexity_samples,
        )

    # ---- Tasks -------------------------------------------------------------------------------
    out = args.out or args.workdir / "evaluation.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    harness_out = out.with_name(f"{out.stem}_harness.json")
    tasks: dict[str, Any] = {}
    tasks_routing = args.routing or "prompt"
    if args.tasks is not None:
        found = _tasks_module().run_tasks(
            run.model,
            args.tasks,
            routing=tasks_routing,
            batch_size=args.batch_size,
            limit=args.limit,
            tasks_data=args.tasks_data,
            include_path=args.include_path,
        )
        write_atomically(harness_out, json.dumps(found, indent=1) + "\n")
        tasks = _tasks_module().summary(found)

    # ---- Perplexity --------------------------------------------------------------------------
    result = measure(run, held_out, args.routing) | {"split": args.split, "tasks": tasks}
    if own_sets:
        result["perplexity_sets"] = measure(run, own_sets, args.routing)
    if args.top_k_experts:
        result["top_k_experts"] = variants.top_k_perplexity(
            run, held_out or own_sets, args.top_k_experts, args.routing
        )
    if args.leakage:
        result["leakage"] = variants.leakage(run, held_out or own_sets)
        picture = out.with_name(f"{out.stem}_positions.png")
        series = result["leakage"]["loss_by_position"]
        plots.write_png(plots.loss_by_position(series, run.model.config.segment_length), picture)
        print(f"wrote {picture}")

    # ---- What comes out ----------------------------------------------------------------------
    result["seconds"] = time.perf_counter() - start
    write_atomically(out, json.dumps(result, indent=1) + "\n")
    print(report(result))
    if tasks:
        model = run.model.config
        routed = f", routed by {'token' if model.routes_tokens else tasks_routing}"
        routed = routed if model.num_experts else ""
        print(_tasks_module().table(f"tasks{routed}", tasks))
        print(f"wrote {harness_out}")
    print(f"wrote {out}")


def evaluate(
    workdir: Path,
    routing: str | None = None,
    data: Path | None = None,
    split: str = "test",
    batch_size: int | None = None,
) -> dict[str, Any]:
    """Measures the newest intact checkpoint of a run on its held-out documents.

    Args:
      workdir: of the run.
      routing: "segment" or "prompt"; None routes positions >= T as in training.
      data: where its prepared data are, if they were moved.
      split: "test" or "validation".
      batch_size: instances at a time over all devices.

    Returns:
      what `measure` does, the split, and no tasks.
    """
    run = open_run(workdir, batch_size)
    sets = held_out_sets(data_directory(workdir, data), split)
    return measure(run, sets, routing) | {"split": split, "tasks": {}}


def measure(run: Run, sets: dict[str, np.ndarray], routing: str | None = None) -> dict[str, Any]:
    """Every one of `MEASURES` by domain, their geometric means, and what was measured how.

    Args:
      run: the model.
      sets: instances of every domain, int32 `[N, L + 1]`.
      routing: "segment" or "prompt"; None routes positions >= T as in training.

    Raises:
      InputError: no position is >= T.
    """
    start = time.perf_counter()
    config, T = run.model.config, run.model.config.segment_length
    if sets and config.sequence_length <= T:
        raise InputError(
            f"{run.workdir}: instances of {config.sequence_length} tokens are one routing segment, "
            "so there are no positions >= T to score"
        )
    routing = routing or as_trained(run)
    training = losses(run, sets, "evaluating", config.measured_routing)
    # With the first segment as the prompt, routing as in training is training's own on
    # positions >= T: one pass serves both. Where tokens are routed, a prompt decides nothing.
    same = routing == as_trained(run) or not config.num_experts or config.routes_tokens
    if config.routes_tokens:
        routing = "token"
    scored = training if same else losses(run, sets, f"evaluating, routed by {routing}", routing)

    token_bytes_V = run.model.tokenizer.token_bytes
    by_domain: dict[str, dict[str, Any]] = {}
    for domain, rows in sets.items():
        everywhere = summarize(training[domain], rows, token_bytes_V, T)
        by_domain[domain] = summarize(scored[domain], rows, token_bytes_V, T) | {
            "perplexity_all_positions": everywhere["perplexity_all_positions"],
            "standard_error": standard_error(scored[domain], T),
        }
    result: dict[str, Any] = {
        name: {domain: values[name] for domain, values in by_domain.items()}
        for name in (*MEASURES, "standard_error")
    }
    result["geometric_mean"] = {
        name: geometric_mean(list(result[name].values())) for name in MEASURES if sets
    }
    return result | {
        "routing": routing if config.num_experts else None,
        "instances": {domain: len(rows) for domain, rows in sets.items()},
        "step": run.model.step,
        "seconds": time.perf_counter() - start,
    }


def geometric_mean(values: list[float]) -> float:
    """The number whose power is the product of `values`, which are positive."""
    return math.exp(math.fsum(math.log(value) for value in values) / len(values))


def report(result: dict[str, Any]) -> str:
    """All that was measured, as aligned tables."""
    routed = f", routed by {result['routing']}" if result["routing"] else ""
    lines = [f"step {result['step']}, in {duration(result['seconds'])}"]
    if result["perplexity"]:
        lines.append(table(f"{result['split']} set{routed}", result))
    if "perplexity_sets" in result:
        lines.append(table(f"own sets{routed}", result["perplexity_sets"]))
    if "top_k_experts" in result:
        rows = {f"top {k}": found for k, found in result["top_k_experts"].items()}
        lines.append(variants.table(f"perplexity, fewer experts{routed}", rows))
    if "leakage" in result:
        lines.append(variants.table("perplexity, segment 1", result["leakage"]["perplexity"]))
    return "\n".join(lines)


def table(title: str, result: dict[str, Any]) -> str:
    """One line per domain and one for the geometric mean, under a line of headings."""
    names = ["geometric mean", *result["perplexity"]]
    width = max(len(name) for name in [*names, title])
    lines = [f"{title:{width}}  perplexity  (s.e.)   all positions  bits per byte"]
    rows = {name: {m: result[m][name] for m in MEASURES} for name in result["perplexity"]}
    for name, row in (rows | {"geometric mean": result["geometric_mean"]}).items():
        error = result["standard_error"].get(name)
        lines.append(
            f"{name:{width}}  {row['perplexity']:10.3f}  "
            f"{'' if error is None else f'{error:.3f}':7}  {row['perplexity_all_positions']:13.3f}"
            f"  {row['bits_per_byte']:13.4f}"
        )
    return "\n".join(lines)


def _counts(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.isdigit() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"got {text!r}, takes numbers of experts, as in 1,2,4")
    return [int(part) for part in parts]


def _check(parser: cli.Parser, args: argparse.Namespace) -> None:
    if args.workdir is None and not (args.list_tasks or args.fetch_tasks):
        parser.error("the following arguments are required: --workdir")
    for name in ("batch_size", "limit", "perplexity_samples"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name}: got {value}, takes an integer of at least 1")
    if (args.limit or args.tasks_data or args.include_path) and args.tasks is None:
        parser.error("--limit, --tasks_data and --include_path: require --tasks")
    if (args.top_k_experts or args.leakage) and args.split == NO_SPLIT and not args.perplexity_sets:
        parser.error("--top_k_experts and --leakage: take held-out documents or --perplexity_sets")
    if args.split == NO_SPLIT and not (args.tasks or args.perplexity_sets):
        parser.error(f"--split={NO_SPLIT}: takes --tasks or --perplexity_sets beside it")


def _tasks_module() -> Any:
    """`evaluation.run_tasks`, which needs lm-evaluation-harness."""
    # The harness forks to draw its bootstraps, and JAX's threads do not survive a fork; its bars
    # print a line per task.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        from lory_jax.evaluation.harness import run as run_tasks
    except ModuleNotFoundError as error:
        raise InputError(
            f"--tasks: needs {error.name}; pip install -r requirements-eval.txt"
        ) from None
    return run_tasks


if __name__ == "__main__":
    cli.run(main)
