"""The queue of the study: its order, what it resumes, and what a kill loses."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest

from lory_jax.data.prepared import PreparedData
from lory_jax.errors import ConfigError, InputError
from tests.support.tiny import ROOT, write_prepared, write_recipe
from tools.study.__main__ import check_all_made, matching, work_off
from tools.study.kinds import Arm, Family
from tools.study.queue import Job, Queue, make_jobs
from tools.study.results import Results, training_digest
from tools.study.run import MODULES, Runner, Stopped

STAND_IN = dict.fromkeys(("train", "evaluate", "measure"), "tests.support.study_worker")
RATE = "train.learning_rate"
FAMILIES = [
    Family("plain", {}, {RATE: (0.5, 0.2, 2.0)}, group=0, steps=5),
    Family("other", {}, {RATE: (0.4, 0.3)}, group=1, steps=5),
]
ARMS = [
    Arm("other", "other", seeds=3, group=1, steps=6),
    Arm("plain", "plain", seeds=3, group=0, steps=9),
    Arm("small", "plain", seeds=3, group=0, steps=6),
    Arm("twice", "plain", factors={RATE: 2.0}, stage="B", seeds=1, steps=6),
]


def runner_of(directory, **changes):
    fields = {
        "recipe": "local",
        "data": lambda corpus, order: directory / "data",
        "work": directory / "work",
        "results": Results(directory / "runs"),
        "splits": ("validation", "test"),
        "stop": threading.Event(),
        "modules": STAND_IN,
        "digest": lambda data: f"digest of {data.name}",
    }
    return Runner(**{**fields, **changes})


def core():
    return min(os.sched_getaffinity(0))


def test_the_order_is_tuning_first_then_seeds_in_rounds_then_cheap_before_dear():
    ids = [job.id for job in make_jobs(FAMILIES, ARMS, "AB")]
    tuning = ["plain-t00", "plain-t01", "plain-t02"]
    first_round = ["small-s0", "plain-s0", "small-s1", "plain-s1", "small-s2", "plain-s2"]
    others = ["other-t00", "other-t01", "other-s0", "other-s1", "other-s2"]
    assert ids == [*tuning, *first_round, *others, "twice-s0"]


def test_a_run_waits_for_its_parent_whose_directory_stays(tmp_path):
    arms = [
        Arm("early", "plain", seeds=2, group=0, steps=3, parents=("late",)),
        Arm("late", "plain", seeds=2, group=2, steps=4, keeps_run=True),
    ]
    runner = runner_of(tmp_path)
    queue = Queue(make_jobs(FAMILIES, arms, "A"), runner.results)
    work_off(queue, runner, [core()])
    assert not queue.remaining()
    log = (runner.work / "steps.txt").read_text()
    for seed in range(2):
        assert log.index(f"late-s{seed} 4") < log.index(f"early-s{seed} 1")
    kept = ["late-s0", "late-s1", "logs", "steps.txt"]
    assert sorted(path.name for path in runner.work.iterdir()) == kept


def test_a_parent_whose_directory_is_gone_is_made_again_for_children_without_result(tmp_path):
    family = Family("f", {}, {RATE: (0.1,)}, group=0, steps=2)
    first = Arm("first", "f", seeds=2, steps=3, keeps_run=True)
    second = Arm("second", "f", seeds=2, steps=4, parents=("first",), keeps_run=True)
    third = Arm("third", "f", seeds=2, steps=5, parents=("second",))
    runner = runner_of(tmp_path)

    def work(arms):
        queue = Queue(make_jobs([family], arms, "A"), runner.results, runner.work)
        waiting = {job.id for job in queue.remaining()}
        work_off(queue, runner, [core()])
        assert not queue.remaining()
        return waiting

    work([first, second, third])
    (tmp_path / "runs" / "third-s1.json").unlink()
    for name in ("first-s0", "first-s1", "second-s1"):
        shutil.rmtree(runner.work / name)
    (runner.work / "first-s1").mkdir()  # and one was begun again
    assert work([first, second, third]) == {"first-s1", "second-s1", "third-s1"}
    assert not (runner.work / "first-s0").exists()


def test_runs_that_can_never_start_are_an_error(tmp_path):
    family = Family("f", {}, {RATE: (0.1,)}, group=0, steps=2)
    parent = Arm("parent", "f", seeds=1, steps=3, keeps_run=True)
    child = Arm("child", "f", seeds=1, steps=4, parents=("parent",))
    for arms, left in (([child], "child-s0"), ([parent, child], "")):
        runner = runner_of(tmp_path / f"with_{len(arms)}")
        queue = Queue(make_jobs([family], arms, "A"), runner.results, runner.work)
        work_off(queue, runner, [core()])
        if left:
            with pytest.raises(InputError, match=f"1 runs cannot start.*: {left}$"):
                check_all_made(queue)
        else:
            check_all_made(queue)


def test_a_run_that_lacks_a_measurement_is_made_again(tmp_path):
    arm = Arm("lory", "f", seeds=3, measures=("routing",))
    other = Arm("plain", "f", seeds=1)
    results = Results(tmp_path / "runs")
    losses = {"test": {"a": np.array([3.0])}}
    weights = {"routing": {"a": np.full((2, 4, 8), 1 / 8)}}
    for name, status, arrays in (
        ("lory-s0", "finished", losses),
        ("lory-s1", "finished", losses | weights),
        ("lory-s2", "diverged", {}),
        ("plain-s0", "finished", losses),
    ):
        results.write({"id": name, "status": status, "corpus": "packages"}, arrays)
    queue = Queue(make_jobs([], [arm, other], "A"), results)
    assert [job.id for job in queue.remaining()] == ["lory-s0"]


def test_a_child_of_several_parents_reads_other_batches_than_they_did(tmp_path):
    family = Family("f", {}, {RATE: (0.1,)}, group=0, steps=2)
    parents = [Arm(name, "f", seeds=2, steps=3, keeps_run=True) for name in ("left", "right")]
    both = ("left", "right")
    child = Arm("child", "f", seeds=2, steps=4, parents=both, reads_on=1, keeps_run=True)
    last = Arm("last", "f", seeds=2, steps=5, parents=("child",), reads_on=2)
    runner = runner_of(tmp_path)
    queue = Queue(make_jobs([family], [last, child, *parents], "A"), runner.results)
    work_off(queue, runner, [core()])
    assert not queue.remaining()
    log = (runner.work / "steps.txt").read_text()
    for seed in range(2):
        begins = log.index(f"child-s{seed} 1")
        assert all(log.index(f"{p.name}-s{seed} 3") < begins for p in parents)
        names = ("left", "right", "child", "last")
        seeds = [runner.results.read(f"{n}-s{seed}")["settings"]["train.seed"] for n in names]
        assert seeds[:2] == [seed, seed] and len({0, 1, *seeds}) == 4


def test_children_of_a_diverged_run_are_left_out(tmp_path):
    family = Family("f", {}, {RATE: (0.1,)}, group=0, steps=2)
    first = Arm("first", "f", {RATE: 2.0}, seeds=1, steps=3, keeps_run=True)
    second = Arm("second", "f", seeds=1, steps=4, parents=("first",), keeps_run=True)
    third = Arm("third", "f", seeds=1, steps=5, parents=("second",))
    runner = runner_of(tmp_path)
    queue = Queue(make_jobs([family], [third, second, first], "A"), runner.results, runner.work)
    work_off(queue, runner, [core()])
    assert not queue.remaining() and queue.next() is None
    assert runner.results.read("first-s0")["status"] == "diverged"
    assert runner.results.read("second-s0") is None and runner.results.read("third-s0") is None


def test_a_stage_alone_tunes_what_it_needs():
    ids = [job.id for job in make_jobs(FAMILIES, ARMS, "B")]
    assert ids == ["plain-t00", "plain-t01", "plain-t02", "twice-s0"]


def test_chosen_arms_come_with_their_trials_and_parents():
    arms = [*ARMS, Arm("late", "plain", parents=("small",))]
    names = [arm.name for arm in matching(["other", "l?te"], arms)]
    assert names == ["other", "small", "late"]
    jobs = make_jobs(FAMILIES, matching(["oth*"], arms), "AB")
    assert {job.source.name for job in jobs} == {"other"}
    assert {job.kind for job in jobs} == {"trial", "run"}
    with pytest.raises(ConfigError, match="got 'none', must fit one of late, other, plain, small"):
        matching(["other", "none"], arms)


def test_arms_start_from_the_best_trial_of_their_family(tmp_path):
    runner = runner_of(tmp_path)
    queue = Queue(make_jobs(FAMILIES, ARMS, "AB"), runner.results)
    work_off(queue, runner, [core(), core()])
    assert not queue.remaining() and queue.next() is None
    records = {record["id"]: record for record in runner.results.records()}
    assert set(records) == {job.id for job in queue.jobs}
    assert records["plain-t02"]["status"] == "diverged"
    assert {record["training_digest"] for record in records.values()} == {"digest of data"}
    assert [records[name]["settings"][RATE] for name in ("plain-s0", "other-s1", "twice-s0")] == [
        0.2,
        0.3,
        0.4,
    ]
    assert records["plain-s2"]["losses"]["test"]["ones"] == pytest.approx(0.22)
    assert list(records["plain-t00"]["losses"]) == ["validation"]
    instances = runner.results.instances("plain-s2", "test")
    np.testing.assert_allclose(instances["threes"], 0.22, atol=1e-3)
    assert not runner.results.instances("plain-t00", "test")
    # Run directories are gone; nothing was trained twice.
    assert sorted(path.name for path in runner.work.iterdir()) == ["logs", "steps.txt"]
    steps = (runner.work / "steps.txt").read_text().splitlines()
    assert len(steps) == len(set(steps)) == 2 * 5 + 2 * 5 + 3 * 6 + 3 * 9 + 3 * 6 + 6


@pytest.mark.parametrize(
    ("usual", "ends", "tried", "chosen"),
    [
        ((1.0, 0.5), (20.0,), (1.0, 0.5), 0.1),  # half is better: no higher rate is tried
        ((1.0, 0.5), (20.0, 0.25), (1.0, 0.5, 0.25), 0.05),  # but a lower one is
        ((1.0,), (20.0,), (1.0, 20.0), 0.2),  # the only one is the best: the higher one diverges
    ],
)
def test_learning_rates_are_tuned_again_at_full_length(
    usual, ends, tried, chosen, tmp_path, monkeypatch
):
    """The long trials vary the best short one, and arms use the best of those of their length.

    A lower rate has a lower loss here.
    """
    monkeypatch.setattr("tools.study.queue.STEPS", 8)
    monkeypatch.setattr("tools.study.queue.TRIAL_STEPS", 5)
    grid = {RATE: (0.5, 0.2, 2.0)}
    family = Family("plain", {}, grid, group=0, steps=5, long_factors=usual, end_factors=ends)
    arms = [Arm("plain", "plain", seeds=1, steps=9), Arm("short", "plain", seeds=1, steps=5)]
    runner = runner_of(tmp_path)
    queue = Queue(make_jobs([family], arms, "A"), runner.results)
    long_ids = [f"plain-l{i}" for i in range(len(usual + ends))]
    tuning = [*(f"plain-t0{i}" for i in range(3)), *long_ids]
    assert [job.id for job in queue.jobs] == [*tuning, "short-s0", "plain-s0"]
    work_off(queue, runner, [core(), core()])
    assert not queue.remaining()
    records = {record["id"]: record for record in runner.results.records()}
    long = [records[name] for name in long_ids if name in records]
    assert {record["kind"] for record in long} == {"long_trial"}
    assert [r["settings"][RATE] for r in long] == pytest.approx([0.2 * x for x in tried])
    assert {record["settings"]["train.steps"] for record in long} == {8}
    assert [r["status"] == "diverged" for r in long] == [factor == 20.0 for factor in tried]
    assert records["plain-s0"]["settings"][RATE] == pytest.approx(chosen)
    assert records["short-s0"]["settings"][RATE] == 0.2


def test_a_first_position_reaches_the_evaluation_of_every_split(tmp_path):
    runner = runner_of(tmp_path)
    for position, expected in ((128, ["--first_position=128"]), (0, [])):
        job = Job("x", Arm("x", "plain", first_position=position))
        flags = runner._evaluations(job)
        assert set(flags) == set(runner.splits)
        assert all(more[1:] == expected for more in flags.values())


def test_a_stopped_run_resumes_where_it_was_saved(tmp_path):
    arms = [Arm("long", "plain", seeds=1, steps=400)]
    families = [Family("plain", {}, {RATE: (0.1,)}, group=0, steps=1)]
    runner = runner_of(tmp_path)
    queue = Queue(make_jobs(families, arms, "A"), runner.results)
    thread = threading.Thread(target=work_off, args=(queue, runner, [core()]))
    thread.start()
    log = runner.work / "steps.txt"
    wait_for(lambda: log.exists() and "long-s0 20" in log.read_text())
    runner.stop.set()
    thread.join(30)
    assert not thread.is_alive() and [job.id for job in queue.remaining()] == ["long-s0"]
    reached = log.read_text().count("long-s0")
    assert 20 <= reached < 400

    again = runner_of(tmp_path)
    queue = Queue(make_jobs(families, arms, "A"), again.results)
    work_off(queue, again, [core()])
    steps = [line for line in log.read_text().splitlines() if line.startswith("long")]
    assert not queue.remaining() and len(steps) == len(set(steps)) == 400


def test_a_stop_between_processes_keeps_the_run(tmp_path):
    runner = runner_of(tmp_path)
    job = make_jobs(FAMILIES, ARMS, "A")[0]
    runner.stop.set()
    with pytest.raises(Stopped):
        runner.run(job, {RATE: 0.1, "train.steps": 1, "train.seed": 0}, core())
    assert runner.results.read(job.id) is None


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel tells children of a death")
def test_a_killed_queue_leaves_no_trainer_behind(tmp_path):
    script = f"""
        import threading
        from tests.tools.test_study_queue import *
        from pathlib import Path
        runner = runner_of(Path({str(tmp_path)!r}))
        families = [Family("plain", {{}}, {{RATE: (0.1,)}}, group=0, steps=4000)]
        jobs = make_jobs(families, [Arm("a", "plain")], "A")
        work_off(Queue(jobs, runner.results), runner, [core()])
    """
    queue = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], cwd=ROOT)
    log = tmp_path / "work" / "steps.txt"
    wait_for(lambda: log.exists() and "plain-t00 20" in log.read_text())
    queue.send_signal(signal.SIGKILL)
    queue.wait()
    saved = tmp_path / "work" / "plain-t00" / "step"
    wait_for(lambda: saved.exists() and saved.read_text())  # created empty, then written
    reached = int(saved.read_text())
    assert 20 <= reached < 4000

    # The trainer had time to save, so the queue goes on with its next step.
    runner = runner_of(tmp_path)
    families = [Family("plain", {}, {RATE: (0.1,)}, group=0, steps=reached + 20)]
    arms = [Arm("a", "plain", seeds=1, steps=1)]
    queue = Queue(make_jobs(families, arms, "A"), runner.results)
    work_off(queue, runner, [core()])
    steps = [line for line in log.read_text().splitlines() if line.startswith("plain-t00")]
    assert not queue.remaining() and len(steps) == len(set(steps)) == reached + 20


def test_a_result_with_other_settings_is_not_mixed_in(tmp_path):
    results = Results(tmp_path)
    queue = Queue(make_jobs(FAMILIES, ARMS, "A"), results)
    job, settings = queue.next()
    results.write({"id": job.id, "settings": {**settings, RATE: 9.0}, "status": "finished"}, {})
    queue.finished(job)
    with pytest.raises(InputError, match="plain-t00"):
        queue.next()


def test_a_failed_process_ends_the_study_with_its_log(tmp_path):
    runner = runner_of(tmp_path, modules=STAND_IN | {"train": "tests.support.no_such_module"})
    queue = Queue(make_jobs(FAMILIES, ARMS, "A"), runner.results)
    with pytest.raises(InputError, match=r"plain-t00: .*no_such_module failed"):
        work_off(queue, runner, [core()])


def test_results_are_tied_to_their_held_out_sets(tmp_path):
    data = PreparedData.open(write_prepared(tmp_path / "data"))
    Results(tmp_path / "runs").bind(data)
    Results(tmp_path / "runs").bind(data)
    other = PreparedData.open(write_prepared(tmp_path / "other", seed=1))
    with pytest.raises(InputError, match="other held-out documents"):
        Results(tmp_path / "runs").bind(other)
    again = write_prepared(tmp_path / "again")
    assert training_digest(again) == training_digest(data.directory)
    assert training_digest(again) != training_digest(other.directory)
    noted = Results(tmp_path / "runs").held_out()
    assert noted["origins"]["test"] == {"ones": [0, 1, 2], "threes": [0, 1, 2]}
    # Earlier versions numbered the origins of each domain apart.
    file = tmp_path / "runs" / "held_out" / "packages.json"
    file.write_text(json.dumps(noted | {"origins": {"test": {"ones": [2, 1, 0]}}}))
    Results(tmp_path / "runs").bind(data)
    assert Results(tmp_path / "runs").held_out() == noted


def test_a_real_run_from_training_to_its_result(tmp_path):
    runner = runner_of(tmp_path, recipe=str(write_recipe(tmp_path)), modules=MODULES)
    write_prepared(tmp_path / "data")
    arm = Arm("lory", "f", steps=12, seeds=1, measures=("routing", "prompt"))
    job = make_jobs([], [arm], "A")[0]
    settings = {"train.steps": 12, "train.seed": 3, "train.upcycle_redraw": 0.5}
    runner.run(job, settings, core())
    origins = PreparedData.open(tmp_path / "data").held_out_origins("validation")
    record = runner.results.read("lory-s0")
    assert record["status"] == "finished" and record["settings"] == settings
    assert record["steps"] == 12 and record["tokens"] == 12 * 4 * 24
    assert [step for step, _ in record["curve"]] == [6, 12]
    assert set(record["losses"]) == {"validation", "test", "test_prompt"}
    assert record["flops_per_token"] > 0 and record["seconds"] > 0
    assert -1 < record["expert_cosine"] < 0.99 and 0 <= record["experts_used"] <= 1
    assert "routing_by_origin" not in record  # it is among the arrays
    for domain, w_OxYxE in runner.results.instances("lory-s0", "routing").items():
        assert w_OxYxE.shape[:2] == (len({*origins[domain]}), 2)
        np.testing.assert_allclose(w_OxYxE.sum(axis=-1), 1.0, atol=2e-3)
    for split, losses in record["losses"].items():
        for domain, loss_N in runner.results.instances("lory-s0", split).items():
            assert loss_N.mean() == pytest.approx(losses[domain], abs=2e-3)
    assert not (runner.work / "lory-s0").exists()


@pytest.mark.slow
def test_a_real_finishing_phase_starts_from_its_parent_and_keeps_few_experts(tmp_path):
    """Without a learning rate, a child is its parent, evaluated with as many experts."""
    recipe = str(write_recipe(tmp_path))
    runner = runner_of(tmp_path, recipe=recipe, modules=MODULES, splits=("test",))
    write_prepared(tmp_path / "data")
    parent = Arm("parent", "f", steps=6, seeds=1, measures=("top1", "top2"), keeps_run=True)
    of_parent = {"train.steps": 6, "train.seed": 3}
    still = {"train.steps": 2, "train.seed": 3, RATE: 0.0}
    children = {"all": still, "two": still | {"model.top_k_experts": 2}}
    arms = [parent, *(Arm(name, "f", seeds=1, parents=("parent",)) for name in children)]
    for job in sorted(make_jobs([], arms, "A"), key=lambda job: job.id != "parent-s0"):
        settings = children.get(job.source.name, of_parent)
        runner.run(job, settings, core())
    losses = {r["arm"]: r["losses"] for r in runner.results.records()}
    assert losses["all"]["test"] == pytest.approx(losses["parent"]["test"], abs=1e-6)
    assert losses["two"]["test"] == pytest.approx(losses["parent"]["test_top2"], abs=1e-6)
    kept = [losses["parent"][split]["ones"] for split in ("test", "test_top1", "test_top2")]
    assert min(abs(a - b) for a, b in ((kept[0], kept[1]), (kept[0], kept[2]), kept[1:])) > 1e-6
    for domain, loss_N in runner.results.instances("parent-s0", "test_top2").items():
        found_N = runner.results.instances("two-s0", "test")[domain]
        np.testing.assert_allclose(found_N, loss_N, atol=2e-3)


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_modules_in_turn_stop_at_the_first_that_fails(tmp_path):
    fields = {"train.learning_rate": 0.1, "train.seed": 0}
    (tmp_path / "fields.json").write_text(json.dumps(fields))
    worker, where = "tests.support.study_worker", f"--workdir={tmp_path}"
    outs = [tmp_path / f"{name}.json" for name in ("first", "second", "third")]
    commands = [[worker, where, "--split=test", f"--out={out}"] for out in outs]
    commands[1][1] = f"--workdir={tmp_path / 'missing'}"
    in_turn = [sys.executable, "-m", "tools.study.in_turn", json.dumps(commands)]
    done = subprocess.run(in_turn, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "missing" in done.stderr
    assert [out.is_file() for out in outs] == [True, False, False]
