"""Exact resume: a run killed many times over equals, bit for bit, one that was never stopped."""

import random
import signal
import time

import pytest

from tests.support.faults import Run, assert_same_run, last_step, unfinished
from tests.support.tiny import write_prepared, write_recipe

pytestmark = pytest.mark.faults

STEPS, UPCYCLING = 60, 15
SIZE = (f"--config.train.steps={STEPS}", "--config.train.validate_every_steps=30")
KILLS = 20


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A recipe, data, and a run of 60 steps that was never stopped."""
    directory = tmp_path_factory.mktemp("kills")
    write_recipe(directory)
    write_prepared(directory / "data")
    Run(directory, "whole", *SIZE).finish()
    return directory


def test_twenty_kills_at_random_moments(site):
    """Most while steps run and checkpoints are written, every fifth while the process starts."""
    seed = random.randrange(10**6)
    print(f"seed {seed}")
    rng = random.Random(seed)
    workdir, done, seen = site / "random", 0, []
    for i, target in enumerate(sorted(rng.sample(range(1, STEPS - 2), KILLS))):
        run = Run(site, "random", *SIZE)
        if i % 5 == 4:
            time.sleep(rng.uniform(0.1, 3.0))
        else:
            run.until(lambda step=target: last_step(workdir) >= step)
            time.sleep(rng.uniform(0.0, 0.05))
        seen.append(last_step(workdir))
        done += run.kill() == -signal.SIGKILL
    Run(site, "random", *SIZE).finish()
    print(f"{done} kills, at steps {seen}")
    assert done >= KILLS - 2  # it may have been faster than its killer once
    assert_same_run(site / "whole", workdir, STEPS)


def frozen_when(run: Run, is_reached) -> bool:
    """Stops a process (SIGSTOP) at a moment that only lasts an instant; False if it was missed."""
    while run.until(is_reached, pause=0):
        run.process.send_signal(signal.SIGSTOP)
        time.sleep(0.01)
        if is_reached():
            return True
        run.process.send_signal(signal.SIGCONT)
        if run.process.poll() is not None:
            break
    return False


def has_begun(workdir) -> bool:
    return bool(unfinished(workdir))


def has_written_all_but_the_name(workdir) -> bool:
    """Both items are complete; the directory has its temporary name still."""
    return any((d / "state").is_dir() and (d / "meta").is_dir() for d in unfinished(workdir))


@pytest.mark.parametrize(
    "is_reached", [has_begun, has_written_all_but_the_name], ids=["while-saving", "before-commit"]
)
def test_kill_in_a_save(site, is_reached):
    """Half-written checkpoints are not used, and removed by the next start."""
    workdir = site / is_reached.__name__
    run = Run(site, workdir.name, *SIZE)
    assert frozen_when(run, lambda: is_reached(workdir)), "no save was caught"
    (half,) = unfinished(workdir)
    run.kill()
    assert half.is_dir()
    assert "damaged" not in Run(site, workdir.name, *SIZE).finish()
    assert not unfinished(workdir)
    assert_same_run(site / "whole", workdir, STEPS)


@pytest.mark.parametrize("moment", ["before", "at", "after"])
def test_kill_around_upcycling(site, moment):
    workdir = site / f"{moment}-upcycling"
    run = Run(site, workdir.name, *SIZE)
    reached = {
        "before": lambda: last_step(workdir) >= UPCYCLING - 1,
        "at": lambda: "every FFN upcycled" in run.text(),
        "after": lambda: last_step(workdir) >= UPCYCLING + 1,
    }
    run.until(reached[moment])
    assert run.kill() == -signal.SIGKILL
    Run(site, workdir.name, *SIZE).finish()
    assert_same_run(site / "whole", workdir, STEPS)
