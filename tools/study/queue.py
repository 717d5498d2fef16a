"""The order of the runs: the cheapest information first, and no arm before its family is tuned."""

import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lory_jax.errors import InputError
from tools.study.arms import COMMON
from tools.study.kinds import RATE, STEPS, TRIAL_STEPS, Arm, Family
from tools.study.results import FIRST_CORPUS, Results, mean_loss, run_id

# An arm has all its seeds before the next group begins: an interval of two seeds says little. In
# stage sparse, whose arms start from a parent, each seed is a round: its children soon tell what it
# was trained for.
PARENT_ROUNDS = (1, 2)
READS_ON = 1000  # far from the seeds of arms
MEASURED = "measured.json"  # the last file of a run directory; until it is there, the run goes on


@dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
      id: names its files.
      source: the family of a trial, or the arm.
      trial: the number of the trial; None for a run of an arm.
      is_long: whether the trial is one at full length.
    """

    id: str
    source: Family | Arm
    seed: int = 0
    trial: int | None = None
    is_long: bool = False

    @property
    def kind(self) -> str:
        """As a result names it."""
        if self.trial is None:
            return "run"
        return "long_trial" if self.is_long else "trial"

    @property
    def steps(self) -> int:
        return STEPS if self.is_long else self.source.steps

    @property
    def family(self) -> str:
        return self.source.family if isinstance(self.source, Arm) else self.source.name

    @property
    def corpus(self) -> str:
        return self.source.corpus if isinstance(self.source, Arm) else FIRST_CORPUS

    @property
    def data(self) -> tuple[str, str]:
        """The corpus and the order of the training documents."""
        return self.corpus, self.source.data if isinstance(self.source, Arm) else "similar"

    @property
    def measures(self) -> tuple[str, ...]:
        return self.source.measures if isinstance(self.source, Arm) else ()

    @property
    def first_position(self) -> int:
        return self.source.first_position if isinstance(self.source, Arm) else 0

    @property
    def parents(self) -> tuple[str, ...]:
        """The ids of the runs that this one starts from."""
        names = self.source.parents if isinstance(self.source, Arm) else ()
        return tuple(run_id(name, self.seed, self.corpus) for name in names)

    @property
    def training_seed(self) -> int:
        """Sets the order of the batches, and what is drawn at the start of a run."""
        reads_on = self.source.reads_on if isinstance(self.source, Arm) else 0
        return self.seed + READS_ON * reads_on

    @property
    def keeps_run(self) -> bool:
        return isinstance(self.source, Arm) and self.source.keeps_run

    @property
    def work(self) -> float:
        """Steps times the cost of one."""
        return self.steps * self.source.cost

    @property
    def order(self) -> tuple[Any, ...]:
        """Jobs are run in this order."""
        has_parents = isinstance(self.source, Arm) and self.source.stage == "sparse"
        round_number = sum(self.seed >= first for first in PARENT_ROUNDS) if has_parents else 0
        kind = ("trial", "long_trial", "run").index(self.kind)
        return round_number, self.source.group, kind, self.seed, self.work, self.id


def make_jobs(families: Sequence[Family], arms: Sequence[Arm], stages: Sequence[str]) -> list[Job]:
    """The runs of the stages, stage by stage; a family is tuned in the first that needs it."""
    jobs: list[Job] = []
    tuned: set[str] = set()
    for stage in stages:
        finals = [arm for arm in arms if arm.stage == stage]
        needed = {arm.family for arm in finals} - tuned
        tuned |= needed
        found = [
            Job(f"{family.name}-t{trial:02d}", family, trial=trial)
            for family in families
            if family.name in needed
            for trial in range(len(family.trials()))
        ]
        found += [
            Job(f"{family.name}-l{trial}", family, trial=trial, is_long=True)
            for family in families
            if family.name in needed
            for trial in range(len(family.long_factors + family.end_factors))
        ]
        found += [
            Job(run_id(arm.name, seed, arm.corpus), arm, seed)
            for arm in finals
            for seed in range(arm.seeds)
        ]
        jobs += sorted(found, key=lambda job: job.order)
    return jobs


class Queue:
    """Hands the next run to whoever asks; safe to ask from several threads."""

    def __init__(self, jobs: Sequence[Job], results: Results, work: Path | None = None):
        """`work` holds the run directories that others start from; None where none does."""
        self.jobs, self.results, self._work = list(jobs), results, work
        self._running: set[str] = set()
        self._changed = threading.Condition()
        self._is_closed = False

    def next(self) -> tuple[Job, dict[str, Any]] | None:
        """The first run that can start, and its settings; waits for one, None if none is left.

        Raises:
          InputError: a run of this name is finished, but had other settings.
        """
        with self._changed:
            while not self._is_closed:
                waiting = 0
                for job in self.jobs:
                    if self.is_needless(job):
                        continue
                    settings = self.settings(job)
                    if job.id in self._running or (settings and self.is_done(job, settings)):
                        continue
                    if settings is not None:
                        self._running.add(job.id)
                        return job, settings
                    waiting += 1
                if not waiting or not self._running:
                    return None
                self._changed.wait()
            return None

    def finished(self, job: Job) -> None:
        """Tells that a run has ended, whether or not it left a result."""
        with self._changed:
            self._running.discard(job.id)
            self._changed.notify_all()

    def close(self) -> None:
        """From now on, no run starts."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def remaining(self) -> list[Job]:
        """The runs without a result, and those that must be made again."""
        return [
            job
            for job in self.jobs
            if (self.results.read(job.id) is None or self._is_wanted_again(job))
            and not self.is_needless(job)
        ]

    def _is_made(self, run: str) -> bool:
        """Whether a run that others start from has a result and is on this machine."""
        return self.results.read(run) is not None and self._is_here(run)

    def _has_diverged(self, run: str) -> bool:
        record = self.results.read(run)
        return record is not None and record["status"] == "diverged"

    def _is_here(self, run: str) -> bool:
        return self._work is None or (self._work / run / MEASURED).is_file()

    def _is_wanted_again(self, job: Job) -> bool:
        """Whether a run with a result is made again.

        It is where a measurement was declared after the run, and where others start from the run
        and it is not here.
        """
        if self._lacks_routing(job):
            return True
        if not job.keeps_run or self._is_here(job.id) or self._has_diverged(job.id):
            return False
        children = [other for other in self.jobs if job.id in other.parents]
        return any(self.results.read(c.id) is None or self._is_wanted_again(c) for c in children)

    def _lacks_routing(self, job: Job) -> bool:
        """Whether a finished run was not measured by folder, as it was not before 2026-12-01."""
        return (
            "routing" in job.measures
            and not self._has_diverged(job.id)
            and not self.results.instances(job.id, "routing")
        )

    def is_needless(self, job: Job) -> bool:
        """Whether a job tries a learning rate beyond one that was not the best, or starts from a
        run that diverged."""
        return self._is_wanted(job) is False or any(map(self._is_lost, job.parents))

    def _is_lost(self, run: str) -> bool:
        """Whether a run diverged, or one that it starts from."""
        parents = next((job.parents for job in self.jobs if job.id == run), ())
        return self._has_diverged(run) or any(map(self._is_lost, parents))

    def _is_wanted(self, job: Job) -> bool | None:
        """Whether the rate next to an outermost one was the best; None before that is known.

        True for all other jobs.
        """
        factor, family = _factor(job), job.source
        if not isinstance(family, Family) or factor not in family.end_factors:
            return True
        usual = range(len(family.long_factors))
        records = [self.results.read(f"{family.name}-l{trial}") for trial in usual]
        losses = [mean_loss(record) for record in records if record is not None]
        if len(losses) < len(usual):
            return None
        nearest = min(usual, key=lambda i: abs(math.log(family.long_factors[i] / factor)))
        return losses[nearest] == min(losses)

    def is_done(self, job: Job, settings: Mapping[str, Any]) -> bool:
        """Whether a run has a result and need not be made again.

        Raises:
          InputError: the result was made with other settings.
        """
        record = self.results.read(job.id)
        if record is None:
            return False
        if record["settings"] != dict(settings):
            raise InputError(
                f"{self.results.directory / job.id}.json: was made with other settings than this "
                "version of the study has; remove it to run it again"
            )
        return not self._is_wanted_again(job)

    def settings(self, job: Job) -> dict[str, Any] | None:
        """The settings of a run; None as long as its family is not tuned or a parent not made."""
        own = self._tried(job) if isinstance(job.source, Family) else self._chosen(job, job.source)
        if own is None:
            return None
        return {**COMMON, "train.steps": job.steps, "train.seed": job.training_seed, **own}

    def _tried(self, job: Job) -> dict[str, Any] | None:
        """What a trial sets."""
        assert isinstance(job.source, Family) and job.trial is not None
        if not job.is_long:
            return job.source.trials()[job.trial]
        if not self._is_wanted(job):
            return None
        best = self.best(job.family, "trial")
        return best and {**best, RATE: best[RATE] * _factor(job)}

    def _chosen(self, job: Job, arm: Arm) -> dict[str, Any] | None:
        """What a run of an arm sets. One as short as a short trial uses the best of those."""
        has_long = any(other.family == job.family and other.is_long for other in self.jobs)
        is_short = arm.steps <= TRIAL_STEPS and not arm.parents
        best = self.best(job.family, "long_trial" if has_long and not is_short else "trial")
        if best is None or not all(self._is_made(parent) for parent in job.parents):
            return None
        own = {**best, **arm.settings}
        return own | {name: factor * own[name] for name, factor in arm.factors.items()}

    def best(self, family: str, kind: str) -> dict[str, Any] | None:
        """What the best trial of a family set, by validation loss; None if trials are missing.

        Raises:
          InputError: all its trials diverged.
        """
        trials = [job for job in self.jobs if job.family == family and job.kind == kind]
        trials = [job for job in trials if not self.is_needless(job)]
        records = [(job, self.results.read(job.id)) for job in trials]
        done = [(mean_loss(record), job) for job, record in records if record is not None]
        if len(done) < len(trials) or not trials:
            return None
        loss, job = min(done, key=lambda pair: (pair[0], pair[1].id))
        if loss == float("inf"):
            raise InputError(f"{family}: all trials diverged; the grid must be lower")
        return self._tried(job)


def _factor(job: Job) -> float:
    """What a long trial multiplies the best learning rate by; 0 for other jobs."""
    if not job.is_long or job.trial is None or not isinstance(job.source, Family):
        return 0.0
    return (job.source.long_factors + job.source.end_factors)[job.trial]
