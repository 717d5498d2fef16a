"""The local engine: the tasks of a stage in processes of this machine."""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context

from lory_jax.errors import InputError
from lory_jax.preparation.engine.work import Stage, Work, find_stage, run_task

ATTEMPTS = 3
WATCH_SECONDS = 1.0


class TaskFailed(InputError):
    """A task failed as often as it is tried. What other tasks did is kept."""

    keeps_work = True


class LocalPool:
    """Processes that run tasks, started when they are first needed and used for every stage."""

    def __init__(self, workers: int):
        self._workers = workers
        self._pool: ProcessPoolExecutor | None = None

    def run(self, work: Work, stage: Stage, tasks: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Runs tasks; yields number and rows of each as it ends.

        A single task, or a single worker, runs in this process. An `InputError` of a task is raised
        at once, because it would fail again; after other errors a task is tried three times.

        Raises:
          TaskFailed: a task failed three times.
        """
        if self._workers == 1 or len(tasks) == 1:
            for task in tasks:
                with _quiet() if len(tasks) > 1 else contextlib.nullcontext():
                    rows = run_task(str(work.root), stage, task)
                yield task, rows
            return
        waiting, failures = list(reversed(tasks)), dict.fromkeys(tasks, 0)
        running: dict[Future[int], int] = {}
        while waiting or running:
            # Few tasks are handed out at a time, so that a broken pool says which were running.
            while waiting and len(running) < self._workers:
                task = waiting.pop()
                running[self._submit(str(work.root), stage.name, task)] = task
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                task = running.pop(future)
                error = future.exception()
                if error is None:
                    yield task, future.result()
                    continue
                if isinstance(error, InputError):
                    raise error
                if isinstance(error, BrokenProcessPool):
                    self._forget()
                failures[task] += 1
                if failures[task] == ATTEMPTS:
                    raise TaskFailed(
                        f"stage {stage.name}: task {task} failed {ATTEMPTS} times on "
                        f"{stage.describe(work, task)}; the last time: {_in_words(error)}"
                    ) from error
                waiting.append(task)

    def _submit(self, root: str, stage: str, task: int) -> "Future[int]":
        if self._pool is None:
            self._pool = ProcessPoolExecutor(
                self._workers,
                mp_context=get_context("spawn"),
                initializer=_begin,
                initargs=(os.getpid(),),
            )
        try:
            return self._pool.submit(_run, root, stage, task)
        except BrokenProcessPool:
            self._forget()
            return self._submit(root, stage, task)

    def _forget(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None

    def close(self) -> None:
        """Ends the processes, and with them what they are doing."""
        if self._pool is None:
            return
        processes = list((self._pool._processes or {}).values())
        self._pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences the progress lines of tasks, which would hide that of the stage."""
    with open(os.devnull, "w") as nothing, contextlib.redirect_stderr(nothing):
        yield


def _begin(parent: int) -> None:
    """Prepares a worker: the parent handles Ctrl-C, and a worker without a parent ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    os.environ["TOKENIZERS_PARALLELISM"] = "false"

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(WATCH_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _run(root: str, stage: str, task: int) -> int:
    from lory_jax.preparation.stages import STAGES

    return run_task(root, find_stage(STAGES, stage), task)


def _in_words(error: BaseException) -> str:
    if isinstance(error, BrokenProcessPool):
        return "its process died (killed, or out of memory)"
    return f"{type(error).__name__}: {error}"
