"""`prepare` killed at random moments, by alternating engines: no work is lost, no byte differs."""

import importlib.util
import os
import random
import signal
import sys
import time

import pytest

from tests.support.corpora import SHARDED, contents, prepare_here, start_prepare, write_corpus

KILLS = 20
# An interpreter with requirements-beam.txt, where this one has no Beam.
BEAM_PYTHON = os.environ.get("LORY_BEAM_PYTHON", "")
HAS_BEAM = bool(BEAM_PYTHON) or importlib.util.find_spec("apache_beam") is not None

pytestmark = pytest.mark.faults


def engines():
    local = [(sys.executable, ["--workers=1"]), (sys.executable, ["--workers=2"])]
    beam = [(BEAM_PYTHON or sys.executable, ["--engine=beam", "--workers=2"])]
    return local + (beam if HAS_BEAM else [])


def markers(work):
    return {path: path.read_bytes() for path in work.glob("*/*.json")}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "documents")


@pytest.fixture(scope="module")
def expected(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("prepared") / "data"
    return prepare_here(corpus, out, *SHARDED, "--workers=1")


def test_twenty_kills(corpus, expected, tmp_path):
    rng = random.Random(0)
    out, work = tmp_path / "data", tmp_path / "data.tmp-prepare"
    done: dict = {}
    for kill in range(KILLS):
        python, flags = engines()[kill % len(engines())]
        process = start_prepare(corpus, out, *SHARDED, *flags, python=python)
        wanted = len(done) + rng.randrange(3)
        while process.poll() is None and len(markers(work)) < wanted:
            time.sleep(0.01)
        time.sleep(rng.random())
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        if out.exists():
            break
        now = markers(work)
        assert done.items() <= now.items(), "a finished task ran again"
        done = now
    if not out.exists():
        prepare_here(corpus, out, *SHARDED, "--workers=2")
    assert contents(out) == expected
    assert os.listdir(tmp_path) == ["data"]


@pytest.mark.skipif(not HAS_BEAM, reason="requires Apache Beam; set LORY_BEAM_PYTHON")
@pytest.mark.parametrize("workers", [1, 2])
def test_beam_gives_the_same_bytes(corpus, expected, tmp_path, workers):
    python = BEAM_PYTHON or sys.executable
    flags = ("--engine=beam", f"--workers={workers}")
    process = start_prepare(corpus, tmp_path / "data", *SHARDED, *flags, python=python)
    text, _ = process.communicate()
    assert process.returncode == 0, text
    assert contents(tmp_path / "data") == expected
