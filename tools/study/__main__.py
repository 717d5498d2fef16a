"""Runs the study: a queue of runs, cheapest information first, resumable run by run.

    python -m tools.study [--stage=A|B|C|D|beyond|sparse] [--arms=NAME,...] [--hours=H]
        [--cores=N] [--out=DIR] [--work=DIR]

Each run is trained and evaluated on one core. A finished run leaves one small JSON file and the
losses of its held-out instances in OUT/runs; its run directory is then removed, unless other runs
start from it: those stay in WORK. Ctrl-C, SIGTERM and the end of the hours save the runs under way;
run the same command again to resume. In the end it writes OUT.json, OUT.md and OUT.html
(tools/study/report.py), and the tables of other pages (tools/study/pages.py).
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
from fnmatch import fnmatchcase
from pathlib import Path
from types import FrameType

from lory_jax import cli
from lory_jax.config import load_config
from lory_jax.console import duration
from lory_jax.data.prepared import PreparedData
from lory_jax.errors import ConfigError, InputError
from tools import debian_corpus
from tools.study import corpus
from tools.study.arms import ARMS, FAMILIES
from tools.study.audit import AUDIT, write_audit
from tools.study.kinds import Arm, Family
from tools.study.order import use_kept_order
from tools.study.queue import Queue, make_jobs
from tools.study.results import FIRST_CORPUS, SPLITS, Results
from tools.study.run import Runner, Stopped

ROOT = Path(__file__).resolve().parent.parent.parent
STAGES = ("A", "D", "B", "C", "beyond", "sparse")  # in this order
CORPORA = {"packages": corpus.make_corpus, "debian": debian_corpus.make_corpus}
# One shard of documents: its order is one stream, which can be kept.
PREPARE_FLAGS = {"packages": [], "debian": ["--config.data.shard_documents=200000"]}
RECIPE = str(Path(__file__).with_name("recipe.py"))
STEP_SECONDS = 0.13  # of the dense model on one core, until runs say better


def main(argv: list[str]) -> None:
    args = parse_flags(argv)
    results = Results(args.out / "runs")
    families, arms = FAMILIES, ARMS
    missing = unavailable([*families, *arms])
    for name, reason in missing.items():
        print(f"{name}: left out, because this version cannot train it ({reason})")
    arms = [arm for arm in arms if arm.name not in missing and arm.family not in missing]
    if not debian_corpus.is_possible():
        print("stage D: left out, because its corpus can be made on a Debian system only")
        arms = [arm for arm in arms if arm.corpus == FIRST_CORPUS]
    stages = (args.stage,) if args.stage else STAGES
    arms = [arm for arm in arms if arm.stage in stages]
    jobs = make_jobs(families, matching(args.arms, arms) if args.arms else arms, stages)

    data = Data(args.work, args.out, results)

    stop = threading.Event()
    runner = Runner(RECIPE, data, args.work, results, SPLITS, stop)
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
    queue = Queue(jobs, results, args.work)
    work_off(queue, runner, usable_cores()[-args.cores :])
    if signals:
        sys.exit(128 + signals[0])
    if not stop.is_set():
        check_all_made(queue)
    # Imported here: a study that is stopped draws nothing.
    from tools.study import pages, report

    if args.out == report.OUT:  # the pages in docs/ show the committed results
        pages.main()
    else:
        report.write_report(args.out)


def parse_flags(argv: list[str]) -> argparse.Namespace:
    parser = cli.Parser("study", __doc__)
    parser.prog = "python -m tools.study"
    add = parser.add_argument
    add(
        "--stage",
        choices=STAGES,
        help="run this stage only (default: all, in the order A, D, B, C, beyond, sparse)",
    )
    add(
        "--arms",
        type=lambda text: text.split(","),
        metavar="NAME,...",
        help="run these arms only, and the trials that they need; * and ? are wildcards",
    )
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


def matching(patterns: Sequence[str], arms: Sequence[Arm]) -> list[Arm]:
    """The arms whose name fits one of the patterns, and those that they start from.

    Raises:
      ConfigError: a pattern fits none.
    """
    for pattern in patterns:
        if not any(fnmatchcase(arm.name, pattern) for arm in arms):
            names = ", ".join(sorted({arm.name for arm in arms}))
            raise ConfigError(f"--arms: got {pattern!r}, must fit one of {names}")
    wanted = {arm.name for arm in arms if any(fnmatchcase(arm.name, p) for p in patterns)}
    while more := {p for arm in arms if arm.name in wanted for p in arm.parents} - wanted:
        wanted |= more
    return [arm for arm in arms if arm.name in wanted]


class Data:
    """Prepares the corpora when the first run asks for them; several threads may ask."""

    def __init__(self, work: Path, out: Path, results: Results):
        self._work, self._results = work, results
        self._audit, self._orders = out / AUDIT, out / "orders"
        self._ready: dict[tuple[str, str], Path] = {}
        self._lock = threading.Lock()

    def __call__(self, corpus: str, order: str) -> Path:
        """The prepared data of a corpus with this order of documents.

        Raises:
          InputError: they cannot be made, or the finished runs were measured on other documents.
        """
        with self._lock:
            if (corpus, order) not in self._ready:
                self._ready[corpus, order] = self._prepare(corpus, order)
            return self._ready[corpus, order]

    def _prepare(self, corpus: str, order: str) -> Path:
        out = self._work / "data" / corpus / order
        source = CORPORA[corpus](self._work / "corpus" / corpus)
        flags = [f"--config={RECIPE}", f"--source={source}", f"--order={order}", f"--out={out}"]
        flags += PREPARE_FLAGS[corpus]
        done = subprocess.run([sys.executable, "-m", "lory_jax.prepare", *flags])
        if done.returncode:
            raise InputError(f"{out}: prepare failed with status {done.returncode}")
        use_kept_order(out, source, self._orders / f"{corpus}-{order}.npz")
        prepared = PreparedData.open(out)
        self._results.bind(prepared, corpus)
        if corpus == FIRST_CORPUS and not self._audit.is_file():
            write_audit(prepared, self._audit)
        return out


def check_all_made(queue: Queue) -> None:
    """Raises `InputError` for runs that no other run can bring about, after all were worked off."""
    if left := [job.id for job in queue.remaining()]:
        raise InputError(
            f"{len(left)} runs cannot start, because a run that they start from is not among those "
            f"of the study: {', '.join(left)}"
        )


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
