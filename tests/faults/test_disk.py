"""A run whose disk fills up, turns read-only or vanishes: real file systems, mounted here."""

import contextlib
import json
import shutil
import subprocess

import pytest

from tests.faults.test_recovery import small_disk
from tests.support.faults import Run, assert_same_run, last_step, unfinished
from tests.support.tiny import assert_one_line_error, verb, write_prepared, write_recipe

pytestmark = pytest.mark.faults

STEPS = 120
SIZE = (f"--config.train.steps={STEPS}", "--config.train.validate_every_steps=60")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    directory = tmp_path_factory.mktemp("disk")
    write_recipe(directory)
    write_prepared(directory / "data")
    Run(directory, "whole", *SIZE).finish()
    return directory


def complete_steps(workdir) -> list[int]:
    return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())


def has_our_traceback(text: str) -> bool:
    """TensorStore prints some of its own when a write fails; nothing of ours may."""
    return "lory_jax/train" in text


def fill(disk):
    """Writes a file until nothing more fits."""
    ballast = disk / "ballast"
    # Closing the file writes what is buffered: that, too, finds no room.
    with contextlib.suppress(OSError), open(ballast, "ab", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    return ballast


def turn_read_only(disk) -> None:
    """Lays a read-only view of itself over a disk: files that are open do not hinder it."""
    subprocess.run(["mount", "--bind", str(disk), str(disk)], check=True)
    read_only = ["mount", "-o", "remount,bind,ro", str(disk)]
    while subprocess.run(read_only, capture_output=True).returncode:  # a file was just opened
        pass


def test_a_full_disk_is_said_training_goes_on_and_nothing_is_lost(site):
    """Full from step 20 on; room again from step 60 on."""
    with small_disk(site / "full", "8m") as disk:
        workdir = disk / "w"
        run = Run(site, "full-log", *SIZE, f"--workdir={workdir}")
        run.until(lambda: last_step(workdir) >= 20)
        ballast = fill(disk)
        good = complete_steps(workdir)
        assert run.until(lambda: "could not be written: No space left on device" in run.text())
        assert complete_steps(workdir)[0] >= good[0]
        ballast.unlink()
        text = run.finish()
        assert "damaged" not in text and f"finished at step {STEPS}" in text
        assert not unfinished(workdir)
        assert_same_run(site / "whole", workdir, STEPS)


def test_a_disk_full_to_the_end(site):
    """The run ends with an error; what was saved before is intact, and a resume needs only room."""
    with small_disk(site / "end", "8m") as disk:
        workdir = disk / "w"
        run = Run(site, "end-log", *SIZE, f"--workdir={workdir}")
        run.until(lambda: last_step(workdir) >= 20)
        while run.process.poll() is None:  # what a failed save gives back is taken at once
            ballast = fill(disk)
        assert run.wait() == 1, run.text()
        assert "error: " in run.text() and "could not be" in run.text()
        assert not has_our_traceback(run.text())
        ballast.unlink()
        text = Run(site, "end-log", *SIZE, f"--workdir={workdir}").finish()
        assert "damaged" not in text and "resuming" in text
        assert_same_run(site / "whole", workdir, STEPS)


def test_a_disk_that_turns_read_only(site):
    with small_disk(site / "ro", "8m") as disk:
        workdir = disk / "w"
        run = Run(site, "ro-log", *SIZE, f"--workdir={workdir}")
        run.until(lambda: last_step(workdir) >= 20)
        turn_read_only(disk)
        assert run.wait() == 1, run.text()
        assert "Read-only file system" in run.text() and not has_our_traceback(run.text())
        again = verb("train", *arguments(site, workdir))
        assert_one_line_error(again, 1, "cannot be written", "Read-only file system")
        subprocess.run(["umount", str(disk)], check=True)
        assert "resuming" in Run(site, "ro-log", *SIZE, f"--workdir={workdir}").finish()
        assert_same_run(site / "whole", workdir, STEPS)


def arguments(site, workdir) -> list[str]:
    return [
        f"--config={site / 'tiny.py'}",
        f"--data={site / 'data'}",
        f"--workdir={workdir}",
        *SIZE,
    ]


def test_a_workdir_that_vanishes_for_a_while(site):
    """Renamed away and back, as a network file system goes and comes; what a save that was under
    way makes in its place is not taken for it."""
    workdir, away = site / "gone", site / "away"
    run = Run(site, "gone", *SIZE)
    run.until(lambda: last_step(workdir) >= 20)
    workdir.rename(away)
    assert run.until(lambda: "config.json is gone" in run.text())
    shutil.rmtree(workdir, ignore_errors=True)
    away.rename(workdir)
    text = run.finish()
    assert "metrics are kept in memory" in text and "no line of metrics is lost" in text
    assert_same_run(site / "whole", workdir, STEPS)
    config = json.loads((workdir / "config.json").read_text())
    assert config["train"]["steps"] == STEPS
