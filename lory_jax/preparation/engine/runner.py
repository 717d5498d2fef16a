"""Runs the stages one after the other through an engine, with progress, and resumes."""

import sys
import time
from collections.abc import Iterator, Sequence
from typing import Protocol

from lory_jax.console import duration, progress
from lory_jax.errors import InputError
from lory_jax.preparation.engine.work import Stage, Work, run_task


class Engine(Protocol):
    """What runs tasks."""

    def run(self, work: Work, stage: Stage, tasks: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Runs tasks; yields number and rows of each."""

    def close(self) -> None:
        """Ends whatever the engine started."""


def run_stages(work: Work, stages: Sequence[Stage], engine: Engine) -> None:
    """Runs every task that has no marker, stage after stage."""
    for stage in stages:
        if work.is_complete(stage.name):
            continue
        pending = work.pending(stage)
        started = time.monotonic()
        count = stage.count(work)
        if len(pending) < count:
            print(
                f"{stage.name}: {count - len(pending)} of {count} tasks are done already",
                file=sys.stderr,
            )
        finished = engine.run(work, stage, pending)
        if len(pending) > 1:
            finished = progress(finished, len(pending), stage.name, "tasks")
        rows = sum(rows for _, rows in finished)
        _end(work, stage)
        seconds = time.monotonic() - started
        documents = f", {rows:,} documents, {rows / max(seconds, 1e-6):,.0f}/s" if rows else ""
        print(f"{stage.name}: {duration(seconds)}{documents}", file=sys.stderr)


def run_some_tasks(work: Work, stages: Sequence[Stage], stage: Stage, part: int, parts: int) -> int:
    """Runs the tasks of one stage that belong to a part, and returns how many had no marker.

    Task i belongs to part i mod `parts`, so any number of jobs can share a stage.

    Raises:
      InputError: the stage before is not complete.
    """
    before = stages[: list(stages).index(stage)]
    for earlier in before:
        if not work.is_complete(earlier.name):
            if missing := work.pending(earlier):
                raise InputError(
                    f"stage: {stage.name} requires stage {earlier.name}, of which "
                    f"{len(missing)} tasks are not done, the first of them {missing[0]}"
                )
            work.complete(earlier)
    mine = [task for task in work.pending(stage) if task % parts == part]
    for task in progress(mine, len(mine), stage.name, "tasks"):
        run_task(str(work.root), stage, task)
    if not work.pending(stage):
        _end(work, stage)
    return len(mine)


def _end(work: Work, stage: Stage) -> None:
    work.complete(stage)
    for task in range(stage.count(work)):
        for line in work.marker(stage.name, task)["say"]:
            print(line)
