import json
import os
import signal
from pathlib import Path

import pytest

from lory_jax.errors import InputError
from lory_jax.preparation import stages
from lory_jax.preparation.engine.local import LocalPool, TaskFailed
from lory_jax.preparation.engine.runner import run_some_tasks, run_stages
from lory_jax.preparation.engine.work import Facts, Stage, Work, run_task

TASKS = 4


def count(work: Work) -> int:
    return TASKS


def write(work: Work, task: int, out: Path) -> Facts:
    """Notes the attempt, and fails as its settings say."""
    with (work.root / "attempts").open("a") as file:
        file.write(f"{task}\n")
    attempts = (work.root / "attempts").read_text().split().count(str(task))
    if attempts <= work.settings["failures"].get(str(task), 0):
        (out / "half").write_text("half")
        if work.settings["how"] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise (InputError if work.settings["how"] == "input" else OSError)("no space left")
    (out / "number").write_text(str(task * task))
    return Facts(rows=task, hash_sum=2**63)


STAGE = Stage("square", count, write, lambda work, task: f"part-{task}.jsonl")


@pytest.fixture
def make(tmp_path, monkeypatch):
    def made(how="error", **failures):
        numbered = {name.removeprefix("task"): times for name, times in failures.items()}
        (tmp_path / "settings.json").write_text(json.dumps({"failures": numbered, "how": how}))
        return Work(tmp_path)

    # Workers import the stages by themselves; in this module's tests they need this one.
    monkeypatch.setattr(stages, "STAGES", (STAGE,))
    return made


def attempts(work):
    return sorted((work.root / "attempts").read_text().split())


def test_a_task_runs_once_and_leaves_a_marker(make):
    work = make()
    assert run_task(str(work.root), STAGE, 3) == 3
    assert run_task(str(work.root), STAGE, 3) == 3
    assert attempts(work) == ["3"]
    assert (work.directory("square", 3) / "number").read_text() == "9"
    marker = work.marker("square", 3)
    assert marker["rows"] == 3 and marker["hash_sum"] == 2**63
    assert list(marker["sha256"]) == ["number"] and marker["peak_mib"] > 1
    assert work.pending(STAGE) == [0, 1, 2]


def test_a_failed_task_leaves_nothing(make):
    work = make(task1=1)
    with pytest.raises(OSError, match="no space left"):
        run_task(str(work.root), STAGE, 1)
    assert os.listdir(work.root / "square") == ["00001.lock"]
    run_task(str(work.root), STAGE, 1)
    assert sorted(os.listdir(work.root / "square")) == ["00001", "00001.json", "00001.lock"]


def test_what_died_between_rename_and_marker_is_done_again(make):
    work = make()
    left = work.directory("square", 2)
    left.mkdir(parents=True)
    (left / "number").write_text("half")
    run_task(str(work.root), STAGE, 2)
    assert (left / "number").read_text() == "4"


def test_a_stage_is_complete_with_its_last_task(make):
    work = make()
    for task in range(TASKS):
        assert not work.is_complete("square")
        run_task(str(work.root), STAGE, task)
    summary = work.complete(STAGE)
    assert work.is_complete("square")
    assert summary["rows"] == 6 and summary["hash_sum"] == 0  # 4 * 2^63 modulo 2^64


def test_the_engine_runs_what_is_pending(make):
    work = make()
    run_task(str(work.root), STAGE, 0)
    run_stages(work, [STAGE], LocalPool(1))
    run_stages(work, [STAGE], LocalPool(1))
    assert attempts(work) == ["0", "1", "2", "3"]


def test_parts_of_a_stage_cover_it_once(make, tmp_path):
    work = make()
    after = Stage("after", lambda work: 1, lambda work, task, out: Facts())
    run_some_tasks(work, [STAGE, after], STAGE, 1, 3)
    assert attempts(work) == ["1"]
    with pytest.raises(InputError, match=r"^stage: after requires stage square.* 3 tasks"):
        run_some_tasks(work, [STAGE, after], after, 0, 1)
    for part in (0, 2):
        run_some_tasks(work, [STAGE, after], STAGE, part, 3)
    assert attempts(work) == ["0", "1", "2", "3"] and work.is_complete("square")
    assert run_some_tasks(work, [STAGE, after], after, 0, 1) == 1


@pytest.fixture
def pool(monkeypatch):
    """A pool whose workers know the stage of this module."""
    monkeypatch.setattr("lory_jax.preparation.engine.local._run", run_here)
    pool = LocalPool(2)
    yield pool
    pool.close()


def run_here(root: str, stage: str, task: int) -> int:
    return run_task(root, STAGE, task)


@pytest.mark.parametrize("how", ["error", "kill"])
def test_a_task_is_tried_again(make, pool, how):
    work = make(how, task2=1)
    run_stages(work, [STAGE], pool)
    assert work.is_complete("square")
    assert attempts(work).count("2") == 2


def test_after_three_failures_the_input_is_named(make, pool):
    work = make("error", task2=9)
    with pytest.raises(TaskFailed, match=r"part-2\.jsonl.*no space left"):
        run_stages(work, [STAGE], pool)
    assert attempts(work).count("2") == 3


def test_bad_input_is_not_tried_again(make, pool):
    work = make("input", task2=9)
    with pytest.raises(InputError, match="no space left"):
        run_stages(work, [STAGE], pool)
    assert attempts(work).count("2") == 1
