"""The scripts that run `prepare` as arrays of jobs: Slurm and Kubernetes are played by stand-ins.

A stand-in writes down what it is asked to run. The test then runs it, every job of an array in an
order of its own, in this process.
"""

import json
import os
import random
import shlex
import subprocess
import sys

import pytest

from lory_jax import prepare
from lory_jax.errors import InputError
from lory_jax.preparation.stages import STAGES, inputs
from tests.support.corpora import SHARDED, TASK_BYTES, contents, prepare_here, write_corpus
from tests.support.tiny import ROOT

JOBS = 3
NAMES = [stage.name for stage in STAGES]
RECORD = '#!/bin/sh\nexec {python} {record} {calls} "$@"\n'
# `sbatch --parsable` prints the number of the job; `kubectl apply -f -` reads a manifest.
RECORDER = """
import json, sys
calls, *arguments = sys.argv[1:]
body = "" if "-" not in arguments else sys.stdin.read()
with open(calls, "a+") as file:
    file.seek(0)
    number = len(file.readlines())
    file.write(json.dumps([arguments, body]) + "\\n")
if "--parsable" in arguments:
    print(f"{100 + number};cluster")
if "--for=condition=complete" in arguments:
    sys.exit("complete" not in open(calls + ".answer").read())
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "documents, of a test")


@pytest.fixture(scope="module")
def expected(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("prepared") / "data"
    return prepare_here(corpus, out, *SHARDED, "--workers=1")


@pytest.fixture
def play(tmp_path, monkeypatch):
    """Runs a script with a stand-in for a command; returns what it was called with."""
    monkeypatch.setattr(inputs, "TASK_BYTES", TASK_BYTES)

    def run(script, command, *arguments, answer="complete", status=0, **environment):
        (tmp_path / "bin").mkdir()
        (tmp_path / "recorder.py").write_text(RECORDER)
        calls = tmp_path / "calls"
        (tmp_path / "calls.answer").write_text(answer)
        stand_in = tmp_path / "bin" / command
        paths = {"record": tmp_path / "recorder.py", "calls": calls}
        stand_in.write_text(RECORD.format(python=sys.executable, **paths))
        stand_in.chmod(0o755)
        path = f"{stand_in.parent}:{os.environ['PATH']}"
        result = subprocess.run(
            ["bash", ROOT / "launch" / script, *arguments],
            env=os.environ | {"PATH": path, "PY": sys.executable, **environment},
            capture_output=True,
            text=True,
        )
        assert result.returncode == status, result.stderr
        return [json.loads(line) for line in calls.read_text().splitlines()], result

    return run


def run_array(words, size):
    """Runs `prepare` of every job of an array; `%` in a word stands for its index."""
    for index in random.Random(0).sample(range(size), size):
        prepare.main([word.replace("%", str(index)) for word in words])


def flags(corpus, directory):
    return [f"--source={corpus}", f"--out={directory / 'd'}", f"--work={directory / 'w'}", *SHARDED]


def test_slurm(play, corpus, expected, tmp_path):
    calls, _ = play(
        "slurm.sh", "sbatch", str(JOBS), *flags(corpus, tmp_path), SBATCH_FLAGS="--mem=4G --qos=q"
    )
    assert len(calls) == len(NAMES)
    for i, (arguments, _) in enumerate(calls):
        given = dict(word.removeprefix("--").partition("=")[::2] for word in arguments)
        assert given["job-name"] == f"lory-{NAMES[i]}"
        assert (given["mem"], given["qos"]) == ("4G", "q")
        assert given["array"] == f"0-{JOBS - 1}"
        # Numbers without the name of the cluster, each of the job before.
        assert given.get("dependency") == (f"afterok:{99 + i}" if i else None)
        python, *module = shlex.split(given["wrap"].replace("$SLURM_ARRAY_TASK_ID", "%"))[:3]
        assert [python, *module] == [sys.executable, "-m", "lory_jax.prepare"]
        words = shlex.split(given["wrap"].replace("$SLURM_ARRAY_TASK_ID", "%"))[3:]
        assert words[-2:] == [f"--stage={NAMES[i]}", f"--task=%/{JOBS}"]
        run_array(words, JOBS)
    assert contents(tmp_path / "d") == expected
    assert not (tmp_path / "w").exists()


def test_kubernetes(play, corpus, expected, tmp_path):
    yaml = pytest.importorskip("yaml")
    calls, _ = play(
        "gke_prepare.sh", "kubectl", str(JOBS), *flags(corpus, tmp_path), IMAGE="registry/image"
    )
    jobs = [yaml.safe_load(body) for arguments, body in calls if arguments[0] == "apply"]
    assert [job["metadata"]["name"] for job in jobs] == [f"lory-prepare-{name}" for name in NAMES]
    for name, job in zip(NAMES, jobs, strict=True):
        pods = job["spec"]["completions"]
        assert pods == job["spec"]["parallelism"] == (1 if name in ("plan", "finish") else JOBS)
        (container,) = job["spec"]["template"]["spec"]["containers"]
        assert container["image"] == "registry/image"
        # What the shell of the pod makes of it, with the index that Kubernetes sets.
        shell, option, line, *rest = container["command"]
        line = line.replace("exec python -m lory_jax.prepare", "printf '%s\\0'")
        output = subprocess.run(
            [shell, option, line, *rest],
            env={"JOB_COMPLETION_INDEX": "INDEX", "PATH": os.environ["PATH"]},
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        words = [word.replace("INDEX", "%") for word in output.split("\0")[:-1]]
        assert words[-2:] == [f"--stage={name}", f"--task=%/{pods}"]
        run_array(words, pods)
    assert contents(tmp_path / "d") == expected


def test_a_failed_job_of_kubernetes_ends_the_script(play, corpus, tmp_path):
    calls, result = play(
        *("gke_prepare.sh", "kubectl", str(JOBS), *flags(corpus, tmp_path)),
        IMAGE="registry/image",
        answer="failed",
        status=1,
    )
    assert "stage plan failed" in result.stderr
    assert len([call for call in calls if call[0][0] == "apply"]) == 1


def test_a_stage_waits_for_the_one_before(corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "TASK_BYTES", TASK_BYTES)
    for stage, part in (("plan", "0/2"), ("read", "1/2")):
        prepare.main([*flags(corpus, tmp_path), f"--stage={stage}", f"--task={part}"])
    with pytest.raises(InputError, match=r"^stage: deduplicate requires stage read"):
        prepare.main([*flags(corpus, tmp_path), "--stage=deduplicate", "--task=0/2"])


def test_one_job_begins_the_work(corpus, tmp_path, monkeypatch):
    """The others of its array must not clear the directory that it works in."""
    monkeypatch.setattr(inputs, "TASK_BYTES", TASK_BYTES)
    prepare.main([*flags(corpus, tmp_path), "--stage=plan", "--task=1/2"])
    assert not (tmp_path / "w").exists()
    prepare.main([*flags(corpus, tmp_path), "--stage=plan", "--task=0/2"])
    assert (tmp_path / "w" / "plan.json").exists()
