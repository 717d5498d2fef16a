"""Runs the study: a queue of runs, cheapest information first, resumable run by run.

    python -m tools.study [--stage=A|B|C] [--hours=H] [--cores=N] [--out=DIR] [--work=DIR]

Each run is trained and evaluated on one core. A finished run leaves one small JSON file and the
losses of its held-out instances in OUT/runs; its run directory is then removed. Ctrl-C, SIGTERM and
the end of the hours save the runs under way; run the same command again to resume. In the end it
writes OUT.json, OUT.md and OUT.html (tools/study/report.py).
"""

import argparse
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from lory_jax import cli
from lory_jax.config import load_config
from lory_jax.console import duration
from lory_jax.data.prepared import PreparedData
from lory_jax.errors import ConfigError, InputError
from tools.study.arms import ARMS, FAMILIES, Arm, Family
from tools.study.audit import AUDIT, write_audit
from tools.study.corpus import make_corpus
from tools.study.queue import Queue, make_jobs
from tools.study.results import SPLITS, Results
from tools.study.run import Runner, Stopped

ROOT = Path(__file__).resolve().parent.parent.parent
STAGES = "ABC"
RECIPE = str(Path(__file__).with_name("recipe.py"))
STEP_SECONDS = 0.28  # of the dense model on one core, until runs say better


def main(argv: list[str]) -> None:
    args = parse_flags(argv)
    results = Results(args.out / "runs")
    families, arms = FAMILIES, ARMS
    missing = unavailable([*families, *arms])
    for name, reason in missing.items():
        print(f"{name}: left out, because this version cannot train it ({reason})")
    arms = [arm for arm in arms if arm.name not in missing and arm.family not in missing]
    jobs = make_jobs(families, arms, args.stage or STAGES)

    data = {order: prepare(order, args.work) for order in sorted({job.data for job in jobs})}
    opened = [PreparedData.open(path) for path in data.values()]
    for prepared in opened:
        results.bind(prepared)
    if not (args.out / AUDIT).is_file():
        write_audit(opened[0], args.out / AUDIT)
    splits = tuple(split for split in SPLITS if split in opened[0].manifest.counts)

    stop = threading.Event()
    runner = Runner(RECIPE, data, args.work, results, splits, stop)
    signals: list[int] = []

    def ask(number: int, frame: FrameType | None) -> None:
        signals.append(number)
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, ask)
    if args.hours is not None:
        timer = threading.Timer(3600 * args.hours, stop.set)
        timer.daemon = True
        timer.start()
    work_off(Queue(jobs, results), runner, usable_cores()[-args.cores :])
    if signals:
        sys.exit(128 + signals[0])
    # Imported here: a study that is stopped draws nothing.
    from tools.study.report import write_report

    write_report(args.out)


def parse_flags(argv: list[str]) -> argparse.Namespace:
    parser = cli.Parser("study", __doc__)
    parser.prog = "python -m tools.study"
    add = parser.add_argument
    add("--stage", choices=tuple(STAGES), help="run this stage only (default: A, then B, then C)")
    add("--hours", type=float, metavar="H", help="stop after so many hours")
    add("--cores", type=int, default=1, metavar="N", help="runs at a time, one core each")
    add("--out", type=Path, default=ROOT / "docs" / "study", metavar="DIR", help="results")
    add("--work", type=Path, default=ROOT / "runs" / "study", metavar="DIR", help="data and runs")
    args = parser.parse(argv)
    if args.hours is not None and args.hours < 0:
        parser.error(f"--hours: got {args.hours}, must be at least 0")
    if not 1 <= args.cores <= len(usable_cores()):
        parser.error(
            f"--cores: got {args.cores}, must be an integer from 1 to {len(usable_cores())}"
        )
    args.out, args.work = args.out.resolve(), args.work.resolve()
    return args


def unavailable(sources: Sequence[Family | Arm]) -> dict[str, str]:
    """The families and arms whose settings this version's config does not have, and why."""
    found = {}
    for source in sources:
        settings = source.trials()[0] if isinstance(source, Family) else source.settings
        try:
            load_config(RECIPE, [(name, str(value)) for name, value in settings.items()])
        except ConfigError as error:
            found[source.name] = str(error)
    return found


def prepare(order: str, work: Path) -> Path:
    """The prepared data with this order of documents, made if they are not there."""
    out = work / "data" / order
    source = make_corpus(work / "corpus")
    flags = [f"--config={RECIPE}", f"--source={source}", f"--order={order}", f"--out={out}"]
    done = subprocess.run([sys.executable, "-m", "lory_jax.prepare", *flags])
    if done.returncode:
        raise InputError(f"{out}: prepare failed with status {done.returncode}")
    return out


def usable_cores() -> list[int]:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def work_off(queue: Queue, runner: Runner, on_cores: Sequence[int]) -> None:
    """Makes runs until none is left or `runner.stop` is set, each core one at a time.

    Raises:
      InputError: a run failed; the others were stopped.
    """
    errors: list[BaseException] = []
    threads = [
        threading.Thread(target=_work, args=(queue, runner, core, errors)) for core in on_cores
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def _work(queue: Queue, runner: Runner, core: int, errors: list[BaseException]) -> None:
    try:
        while not runner.stop.is_set() and (taken := queue.next()) is not None:
            job, settings = taken
            left = queue.remaining()
            number = len(queue.jobs) - len(left) + 1
            seconds = step_seconds(queue) * sum(j.work for j in left)
            print(
                f"run {number} of {len(queue.jobs)}: {job.id}, about {duration(seconds)} of one "
                "core left in all",
                flush=True,
            )
            began = time.monotonic()
            runner.run(job, settings, core)
            queue.finished(job)
            print(f"{job.id}: finished in {duration(time.monotonic() - began)}", flush=True)
    except Stopped:
        print(f"{job.id}: saved; run the same command again to resume", flush=True)
    except BaseException as error:
        errors.append(error)
        runner.stop.set()
    if runner.stop.is_set():
        queue.close()


def step_seconds(queue: Queue) -> float:
    """Seconds of a step of cost 1, the median of the runs so far."""
    costs = {job.id: job.source.cost for job in queue.jobs}
    found = [
        record["step_seconds"] / costs[record["id"]]
        for record in queue.results.records()
        if record["id"] in costs and "step_seconds" in record
    ]
    return statistics.median(found) if found else STEP_SECONDS


if __name__ == "__main__":
    cli.run(main)
