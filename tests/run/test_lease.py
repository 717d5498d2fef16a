"""The lease of a run directory in an object store, against emulators."""

import json
import signal
import subprocess
import sys
import time

import pytest

from lory_jax.errors import InputError
from lory_jax.run.lease import LEASE, Lease
from lory_jax.storage import Staging, storage_path
from lory_jax.training.monitoring.metrics_log import with_unsent_lines
from tests.support.emulators import object_store
from tests.support.tiny import ROOT, metric_line, verb_environment

EXPIRY, RENEWAL = 4.0, 0.4
HOLD = f"""
import sys, time
from lory_jax.run.lease import Lease
from lory_jax.storage import storage_path
lease = Lease(storage_path(sys.argv[1]), {EXPIRY}, {RENEWAL})
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture(scope="module", params=["s3", "gs"])
def bucket(request, tmp_path_factory):
    with object_store(request.param, tmp_path_factory.mktemp(request.param)) as bucket:
        yield bucket


def take(workdir):
    return Lease(storage_path(workdir), EXPIRY, RENEWAL)


def hold(workdir):
    """A process that holds the lease."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, workdir],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        env=verb_environment(),
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line == b"held\n", process.stderr.read()
    return process


def edit(workdir, **fields):
    path = storage_path(workdir) / LEASE
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def test_a_second_run_is_refused_and_a_killed_one_is_not_waited_for(bucket):
    workdir = f"{bucket}/second"
    process = hold(workdir)
    with pytest.raises(InputError, match=f"another process trains in it .process {process.pid} on"):
        take(workdir)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    start = time.monotonic()
    Lease(storage_path(workdir), 60, RENEWAL).release()  # this machine knows that it is gone
    assert time.monotonic() - start < 60
    take(workdir).release()  # and what is released is free


def test_a_lease_of_another_machine_expires(bucket):
    workdir = f"{bucket}/elsewhere"
    process = hold(workdir)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    edit(workdir, machine="another", host="elsewhere")
    start = time.monotonic()
    lease = take(workdir)
    assert time.monotonic() - start >= EXPIRY
    lease.release()


def test_who_lost_its_lease_ends_at_once(bucket):
    workdir = f"{bucket}/lost"
    process = hold(workdir)
    edit(workdir, id="of another process")
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 1
    assert b"took it over" in stderr and b"Traceback" not in stderr
    assert json.loads((storage_path(workdir) / LEASE).read_text())["id"] == "of another process"


def test_metrics_that_wait_for_a_store_survive_a_killed_process(tmp_path, monkeypatch):
    monkeypatch.setenv("LORY_CACHE", str(tmp_path))
    write = (
        "import sys, os, signal; from lory_jax.storage import Staging\n"
        "staging = Staging('logs', 's3://bucket/run')\n"
        "(staging.directory / 'metrics.jsonl').write_text(sys.argv[1])\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    lines = [metric_line(step) for step in (1, 2, 3)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    subprocess.run([sys.executable, "-c", write, text + '{"st'], cwd=ROOT, check=False)
    with_other_name = Staging("logs", "s3://bucket/other")
    assert not list(with_other_name.directory.iterdir())
    staging = Staging("logs", "s3://bucket/run")
    cached = staging.directory / "metrics.jsonl"
    assert with_unsent_lines(lines[:1], cached) == lines
    assert with_unsent_lines([], cached) == lines
    other = [{**lines[0], "loss": 2.0}]
    assert with_unsent_lines(other, cached) == other  # of another run
    with pytest.raises(InputError, match="another process of this machine"):
        Staging("logs", "s3://bucket/run")
    staging.close()
    assert not cached.parent.exists()
