"""One run and what may befall it: bad numbers, a damaged shard, a second run, another plan."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from lory_jax.data.batches import TrainingInstances
from lory_jax.data.prepared import PreparedData
from lory_jax.errors import InputError
from tests.faults.test_recovery import flipped
from tests.support.faults import Run, assert_same_run, last_step, lines_of
from tests.support.tiny import (
    ROOT,
    assert_one_line_error,
    verb,
    verb_environment,
    write_prepared,
    write_recipe,
)

pytestmark = pytest.mark.faults

SIZES = {"sequence_length": 24, "vocab_size": 300, "global_batch_size": 4, "seed": 0}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs")
    write_recipe(directory)
    write_prepared(directory / "data")
    Run(directory, "whole").finish()
    return directory


def snapshot(directory) -> dict:
    files = (path for path in directory.rglob("*") if path.is_file())
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def doctor(site, workdir):
    before = snapshot(site)
    result = verb("doctor", f"--workdir={workdir}")
    assert snapshot(site) == before
    return result


# ---------------------------------------------------------------- numbers


def test_a_run_without_numbers_stops_and_says_where(site):
    more = ("--config.train.learning_rate=1e30", "--config.train.clip_norm=0")
    run = Run(site, "diverged", *more, "--config.train.max_skipped_steps=3")
    assert run.wait() == 3, run.text()
    assert "3 in a row, 3 in total" in run.text() and "Traceback" not in run.text()
    (path,) = run.workdir.glob("diverged-*.json")
    found = json.loads(path.read_text())
    lines = map(json.loads, (run.workdir / "metrics.jsonl").read_text().splitlines())
    skipped = [line["step"] for line in lines if line.get("skipped")]
    assert found["step"] == skipped[2] and found["in_a_row"] == 3
    ids = PreparedData.open(site / "data").training_batches(**SIZES).record_ids(found["step"] - 1)
    assert found["record_ids"] == ids.tolist()
    assert len(found["gradient_norms"]["layers.attention_norm"]) == 2  # layer by layer
    assert max(found["parameter_norms"]["layers.ffn.gate"]) > 1e20


# ---------------------------------------------------------------- a damaged shard


def test_a_damaged_shard_stops_the_run_with_everything_saved(site, tmp_path):
    """One bit of a record that a step in the middle of the run reads."""
    data = tmp_path / "data"
    shutil.copytree(site / "data", data)
    shard = next((data / "train").iterdir())
    prepared = PreparedData.open(data)
    source = TrainingInstances(prepared.manifest, data)
    batches = prepared.training_batches(**SIZES)
    use = {int(record): step for step in range(20) for record in batches.record_ids(step)}
    used = np.flatnonzero(np.frombuffer(shard.read_bytes(), np.uint8))  # most is padding
    for offset in used[len(used) // 4 :: 31].tolist():
        before = flipped(shard, offset, 0)
        bad = [record for record in range(len(source)) if not is_readable(source, record)]
        if len(bad) == 1 and 5 <= use.get(bad[0], 0) <= 9:
            break
        shard.write_bytes(before)
    step = use[bad[0]]
    run = Run(site, "shard", f"--data={data}")
    assert run.wait() == 1, run.text()
    errors = [line for line in run.text().splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and shard.name in errors[0] and "damaged" in errors[0]
    saved = max(int(p.name) for p in (run.workdir / "checkpoints").iterdir())
    assert saved == last_step(run.workdir) and step - 2 <= saved <= step
    sick = doctor(site, run.workdir)
    assert sick.returncode == 1 and f"PROBLEM  {shard}: damaged" in sick.stdout, sick.stderr
    assert f"train would resume at step {saved} of 12" in sick.stdout
    shard.write_bytes(before)
    assert f"at step {saved} of 12" in Run(site, "shard", f"--data={data}").finish()
    assert_same_run(site / "whole", run.workdir, 12)


def is_readable(source, record: int) -> bool:
    try:
        source[record]
    except InputError:
        return False
    return True


# ---------------------------------------------------------------- whose directory it is


def test_a_second_run_is_refused_while_the_first_goes_on(site):
    first = Run(site, "busy", "--config.train.steps=100000")
    assert first.until(lambda: last_step(first.workdir) >= 1)
    second = Run(site, "busy", "--config.train.steps=100000")
    assert second.wait() == 1
    assert f"process {first.process.pid} on" in second.text()
    assert first.process.poll() is None
    first.kill()
    third = Run(site, "busy", "--config.train.steps=100000")
    assert third.until(lambda: "resuming" in third.text()), third.text()
    third.kill()


def test_more_steps_on_purpose(site):
    """A finished run goes on; one stopped in its dense phase goes on past a border moved back."""
    workdir = site / "longer"
    shutil.copytree(site / "whole", workdir)
    refused = Run(site, "longer", "--config.train.steps=14")
    assert refused.wait() == 1 and "change_steps" in refused.text()
    text = Run(site, "longer", "--config.train.steps=14", "--change_steps").finish()
    assert "at step 12 of 14" in text and "train.steps: found 12, wanted 14" in text
    assert [line[0] for line in lines_of(workdir)] == list(range(1, 15))
    assert json.loads((workdir / "config.json").read_text())["train"]["steps"] == 14


def test_retention_of_a_run_and_what_the_doctor_says(site):
    """Newest 1, best 1, every 4th; and saves by the clock, at every step of this run."""
    keep = ("keep=1", "keep_best=1", "keep_every_steps=4", "every_minutes=1e-6")
    run = Run(site, "kept", *(f"--config.checkpoint.{field}" for field in keep))
    run.finish()
    lines = [json.loads(line) for line in (run.workdir / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["validation_loss"] for line in lines if "validation_loss" in line}
    best = min(losses, key=losses.get)
    kept = {int(path.name) for path in (run.workdir / "checkpoints").iterdir()}
    assert kept == {4, 8, 12, best}
    assert lines[-1]["goodput"]["save"] > lines[5]["goodput"]["save"] > 0
    (run.workdir / "checkpoints" / "13.orbax-checkpoint-tmp").mkdir()
    newest = run.workdir / "checkpoints" / "12"
    for path in (newest / "state").rglob("d/*"):
        path.write_bytes(b"")
    report = doctor(site, run.workdir)
    assert report.returncode == 1
    assert (
        "PROBLEM  checkpoint 12: " in report.stdout and "ok       checkpoint 8: " in report.stdout
    )
    assert "13.orbax-checkpoint-tmp: half-written" in report.stdout
    assert "train would resume at step 8 of 12, phase experts" in report.stdout
    assert "metrics.jsonl: 12 lines, 4 of steps that would run again" in report.stdout
    well = doctor(site, site / "whole")
    assert well.returncode == 0 and "the run is finished, at step 12" in well.stdout, well.stdout


# ---------------------------------------------------------------- files that are not to be trusted

AUDIT = """
import sys, lory_jax
from pathlib import Path
from lory_jax.data.prepared import PreparedData

def read():
    lory_jax.load(sys.argv[1])
    data = PreparedData.open(sys.argv[2])
    data.tokenizer
    data.held_out("test")

read()  # imports what is imported late
FORBIDDEN = ("pickle.find_class", "marshal.loads", "exec", "compile", "import", "os.system",
             "subprocess.Popen", "os.exec", "os.posix_spawn", "ctypes.dlopen")
seen = []
sys.addaudithook(lambda event, args: seen.append((event, args)) if event in FORBIDDEN else None)
read()
import pickle; pickle.loads(pickle.dumps(Path))  # the hook sees what it should
print([event for event, _ in seen])
"""


def test_reading_a_run_and_its_data_executes_nothing(site):
    result = subprocess.run(
        [sys.executable, "-c", AUDIT, site / "whole", site / "data"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=verb_environment(),
    )
    assert result.returncode == 0, result.stderr
    events = json.loads(result.stdout.splitlines()[-1].replace("'", '"'))
    assert set(events) <= {"import", "pickle.find_class"} and events.count("pickle.find_class") == 1


def test_another_config_is_refused_with_the_difference(site):
    result = verb(
        "train",
        f"--config={site / 'tiny.py'}",
        f"--data={site / 'data'}",
        f"--workdir={site / 'whole'}",
        "--config.train.beta2=0.9",
    )
    assert_one_line_error(result, 1, "train.beta2: found 0.95, wanted 0.9)")
