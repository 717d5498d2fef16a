"""Measures perplexity, bits per byte and downstream tasks of a trained model.

    python -m lory_jax.evaluate --workdir=RUN_DIR [--out=FILE.json] [--step=newest|best|N]
    python -m lory_jax.evaluate --workdir=RUN_DIR --tasks=lory_paper [--limit=N] [--tasks_data=DIR]
    python -m lory_jax.evaluate --workdir=RUN_DIR --perplexity_sets=DIR
    python -m lory_jax.evaluate --workdir=RUN_DIR --top_k_experts=1,2,4 --leakage
    python -m lory_jax.evaluate --list_tasks
    python -m lory_jax.evaluate --tasks=lory_paper --fetch_tasks=DIR

Perplexity is measured on held-out documents, domain by domain. The headline counts the positions
>= T, where no prediction can see its future. Perplexity over all positions is always routed as in
training, like that of the paper; sparse baselines are routed as at inference, where no token
depends on another. Beside the results, FILE_instances.npz holds the loss and the origin of every
held-out instance, so that runs can be compared in pairs. docs/evaluation.md has the details.
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

from lory_jax import cli
from lory_jax.errors import InputError
from lory_jax.evaluation.tables import report_text
from lory_jax.storage import check_writable, local_path, storage_path, write_atomically

NO_SPLIT = "none"


def main(argv: list[str]) -> None:
    args = parse_flags(argv)
    if args.list_tasks:
        print(_harness().list_tasks())
    elif args.fetch_tasks:
        _harness().fetch_tasks(args.fetch_tasks, args.tasks or "lory_paper")
    else:
        evaluate(args)


def evaluate(args: argparse.Namespace) -> None:
    """Measures what the flags ask for; prints every result before it is written."""
    # Imported here, so that flags are answered before JAX starts.
    from lory_jax.evaluation import variants
    from lory_jax.evaluation.held_out import encode_instances
    from lory_jax.evaluation.measure import measure, measure_losses, open_model, summarize_losses
    from lory_jax.evaluation.perplexity import perplexity
    from lory_jax.evaluation.text_sets import read_sets
    from lory_jax.parallel import start_process
    from lory_jax.run.directory import RunDirectory

    # ---- Check everything that can be wrong before anything slow starts ------------------------
    start = time.perf_counter()
    run = RunDirectory(args.workdir, args.step)
    out = args.out or run.evaluation_file
    check_writable(out, "out")
    start_process()
    evaluated = open_model(run, args.batch_size)
    if args.segment_length is not None:
        evaluated = evaluated.with_segment_length(args.segment_length)
    evaluated = evaluated._replace(scored_from=args.first_position)
    variants.check_variants(evaluated, args.top_k_experts, args.leakage)
    held_out, origins, own_sets = {}, {}, {}
    if args.split != NO_SPLIT:
        data = run.open_data(args.data)
        held_out = data.held_out_with_instances(args.split)
        origins = data.held_out_origins(args.split)
    if args.perplexity_sets:
        length, samples = evaluated.model.config.sequence_length, args.perplexity_samples
        own_sets = read_sets(args.perplexity_sets, run.tokenizer, length, samples)

    # ---- Tasks --------------------------------------------------------------------------------
    tasks = measure_tasks(args, evaluated.model, out) if args.tasks is not None else {}

    # ---- Perplexity ---------------------------------------------------------------------------
    losses = measure_losses(evaluated, held_out, args.routing)
    result = summarize_losses(evaluated, held_out, losses, origins)
    result |= {"checkpoint": args.step, "split": args.split, "tasks": tasks}
    result["segment_length"] = evaluated.model.config.segment_length
    result["first_position"] = evaluated.first_position
    sets = held_out or own_sets
    if own_sets:
        result["perplexity_sets"] = measure(evaluated, own_sets, args.routing)
    top_k_losses = variants.top_k_losses(evaluated, sets, args.top_k_experts, args.routing)
    if args.top_k_experts:
        result["top_k_experts"] = {
            k: {domain: perplexity(loss_N) for domain, loss_N in by_domain.items()}
            for k, by_domain in top_k_losses.items()
        }
    if args.leakage:
        result["leakage"] = variants.leakage(evaluated, sets)
    result["seconds"] = time.perf_counter() - start

    # ---- Results ------------------------------------------------------------------------------
    print(report_text(result))
    write(out, json.dumps(result, indent=1) + "\n")
    if held_out:
        tables = {"": losses.of_instances(evaluated.first_position)}
        tables |= {f"_top{k}": by_domain for k, by_domain in top_k_losses.items()}
        for suffix, of_instances in tables.items():
            path = out.with_name(f"{out.stem}{suffix}_instances.npz")
            write(path, encode_instances(of_instances, origins))
    if args.leakage:
        segment_length = evaluated.model.config.segment_length
        draw_positions(result["leakage"]["loss_by_position"], segment_length, out)


def measure_tasks(args: argparse.Namespace, model: Any, out: Path) -> dict[str, Any]:
    """Runs the tasks of the harness, prints and writes their results, and returns a summary."""
    harness, routing = _harness(), args.routing or "prompt"
    found = harness.run_tasks(
        model,
        args.tasks,
        routing=routing,
        batch_size=args.batch_size,
        limit=args.limit,
        tasks_data=args.tasks_data,
        include_path=args.include_path,
    )
    tasks = harness.task_summary(found)
    routed = f", routed by {'token' if model.config.routes_tokens else routing}"
    print(harness.task_table(f"tasks{routed if model.config.num_experts else ''}", tasks))
    write(out.with_name(f"{out.stem}_harness.json"), json.dumps(found, indent=1) + "\n")
    return tasks


def draw_positions(series: dict[str, list[float]], segment_length: int, out: Path) -> None:
    """Draws the loss by position in a picture beside `out`."""
    from lory_jax.report import plots

    picture = out.with_name(f"{out.stem}_positions.png")
    plots.write_png(plots.loss_by_position(series, segment_length), picture)
    print(f"wrote {picture}")


def write(path: Path, contents: str | bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, contents)
    except OSError as error:  # the disk filled up in the meantime
        raise InputError(f"out: {path} cannot be written ({error.strerror or error})") from None
    print(f"wrote {path}")


def parse_flags(argv: list[str]) -> argparse.Namespace:
    parser = cli.Parser("evaluate", __doc__)
    add = parser.add_argument
    add("--workdir", type=storage_path, metavar="RUN_DIR", help="run directory that train wrote")
    parser.add_step_flag()
    add(
        "--out",
        type=storage_path,
        metavar="FILE.json",
        help="file to write (default: RUN_DIR/evaluation.json)",
    )
    add(
        "--routing",
        choices=("segment", "prompt"),
        help="routing of positions >= T, with the first T tokens as the prompt (default: as the "
        "model was trained, which is segment, or prompt after prefix routing), and of tasks "
        "(default: prompt)",
    )
    add("--data", type=storage_path, metavar="DIR", help="the prepared data, if they were moved")
    add(
        "--split",
        choices=("test", "validation", "confirmation", NO_SPLIT),
        default="test",
        help="which held-out documents to read (default: test); confirmation is a second "
        "test set, for what was chosen on the others; none reads no held-out documents",
    )
    add("--batch_size", type=int, help="rows at a time (default: as in training; for tasks: 16)")
    add(
        "--perplexity_sets",
        type=local_path,
        metavar="DIR",
        help="also measure perplexity on texts of your own: DIR/NAME.jsonl, or text files in "
        "DIR/NAME/",
    )
    add(
        "--perplexity_samples",
        type=int,
        default=1000,
        metavar="N",
        help="at most N samples of L tokens from each of these sets (default: 1,000)",
    )
    add(
        "--top_k_experts",
        metavar="K,...",
        default=(),
        type=_counts,
        help="also measure perplexity with only the K experts of largest weight merged, for each K",
    )
    add(
        "--segment_length",
        type=int,
        metavar="T",
        help="tokens per routing segment, and the first position that is scored (default: as in "
        "training); requires --out",
    )
    add(
        "--first_position",
        type=int,
        metavar="P",
        help="the first position that is scored, at least T (default: T), so that models with "
        "segments of several lengths are scored on the same tokens; requires --out",
    )
    add(
        "--leakage",
        action="store_true",
        help="also measure what segment 1 gains from being routed by its own mean, and draw the "
        "loss by position",
    )
    add(
        "--tasks",
        metavar="A,B",
        help="tasks to run, separated by commas: lory_paper, tasks of that group, others that "
        "lm-evaluation-harness knows, or files (task.yaml)",
    )
    add(
        "--include_path",
        type=local_path,
        metavar="DIR",
        help="a directory of more task files (.yaml)",
    )
    add("--limit", type=int, metavar="N", help="use only the first N documents of each task")
    add(
        "--tasks_data",
        type=local_path,
        metavar="DIR",
        help="documents of the tasks (default: from the Hugging Face hub)",
    )
    add(
        "--fetch_tasks",
        type=local_path,
        metavar="DIR",
        help="write the documents of --tasks to DIR, and exit",
    )
    add("--list_tasks", action="store_true", help="print the tasks of the paper, and exit")
    args = parser.parse(argv)
    _check(parser, args)
    return args


def _counts(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.isdigit() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"got {text!r}, must be numbers of experts, as in 1,2,4")
    return [int(part) for part in parts]


def _check(parser: cli.Parser, args: argparse.Namespace) -> None:
    if args.workdir is None and not (args.list_tasks or args.fetch_tasks):
        parser.error("the following arguments are required: --workdir")
    for name in ("batch_size", "limit", "perplexity_samples"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name}: got {value}, must be an integer of at least 1")
    for name in ("segment_length", "first_position"):
        if getattr(args, name) is not None and args.out is None:
            parser.error(f"--{name}: requires --out: the run's own evaluation is as trained")
    for name in ("limit", "tasks_data"):
        if getattr(args, name) is not None and args.tasks is None:
            parser.error(f"--{name}: requires --tasks")
    has_texts = args.split != NO_SPLIT or args.perplexity_sets
    for name in ("top_k_experts", "leakage"):
        if getattr(args, name) and not has_texts:
            parser.error(f"--{name}: requires held-out documents or --perplexity_sets")
    if not (has_texts or args.tasks):
        parser.error(f"--split={NO_SPLIT}: requires --tasks or --perplexity_sets")


def _harness() -> Any:
    """The module `evaluation.harness.run`, which requires lm-evaluation-harness."""
    # The harness forks to draw its bootstraps, and JAX's threads do not survive a fork. Its
    # progress bars print one line per task.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        from lory_jax.evaluation.harness import run as harness
    except ModuleNotFoundError as error:
        raise InputError(
            f"tasks: requires {error.name}; pip install -r requirements-eval.txt"
        ) from None
    return harness


if __name__ == "__main__":
    cli.run(main)
