"""launch/local.sh and launch/setup.sh, with a stand-in for Python, at paths with spaces."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.tiny import ROOT

PATIENCE = 60  # seconds

# It writes its arguments down; a verb does what the file of its name says.
PYTHON = """#!/usr/bin/env bash
here=$(cd "$(dirname "$0")/../.." && pwd)
[ "$1" != -m ] && exec {python} "$@"
[ "$2" = pip ] && {{ echo "no pip in tests" >&2; exit 9; }}
line=$(printf '<%s>' "$@")
echo "$line" >>"$here/started"  # at once: two verbs may start at the same time
play="$here/plays/${{2#lory_jax.}}"
if [ -f "$play" ]; then source "$play"; fi
"""


class Site:
    """A copy of the launch scripts, beside an environment that counts as installed."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.out = directory / "runs of mine"
        shutil.copytree(ROOT / "launch", directory / "launch")
        for path in ROOT.glob("requirements*.txt"):
            shutil.copy(path, directory)
        lists = "".join(path.read_text() for path in sorted(ROOT.glob("requirements*.txt")))
        python = directory / "the venv" / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text(PYTHON.format(python=sys.executable))
        python.chmod(0o755)
        (directory / "the venv" / ".installed-requirements.txt").write_text(lists)
        (directory / "plays").mkdir()

    def play(self, verb: str, body: str) -> None:
        (self.directory / "plays" / verb).write_text(body)

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", self.directory / "launch" / "local.sh", f"--out={self.out}", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"VENV": str(self.directory / "the venv")},
            start_new_session=True,
        )

    def run(self, *arguments: str) -> tuple[int, str]:
        process = self.start(*arguments)
        output, _ = process.communicate(timeout=PATIENCE)
        return process.returncode, output

    def started(self) -> list[str]:
        """The verbs that were started, in this order."""
        lines = (self.directory / "started").read_text().splitlines()
        return [line.split("<lory_jax.")[1].partition(">")[0] for line in lines]


@pytest.fixture
def site(tmp_path):
    (tmp_path / "a checkout").mkdir()
    return Site(tmp_path / "a checkout")


def test_the_flow_hands_every_path_on(site):
    status, output = site.run("--steps=7")
    assert status == 0, output
    flow = ["prepare", "train", "train", "evaluate", "evaluate", "analyze", "compare"]
    assert site.started() == flow
    text = (site.directory / "started").read_text()
    assert f"<--out={site.out}/data>" in text
    for name, experts in (("dense", 0), ("lory", 8)):
        (line,) = [line for line in text.splitlines() if f"<--workdir={site.out}/{name}>" in line][
            :1
        ]
        assert f"<--config=configs/local.py:experts={experts}><--config.train.steps=7>" in line
        assert f"<--data={site.out}/data>" in line
    assert f"<dense={site.out}/dense><lory={site.out}/lory><--out={site.out}/report>" in text


def test_a_second_run_skips_what_is_evaluated(site):
    for name in ("dense/evaluation.json", "lory/evaluation.json", "lory/analysis/analysis.json"):
        (site.out / name).parent.mkdir(parents=True, exist_ok=True)
        (site.out / name).write_text("{}")
    status, output = site.run()
    assert status == 0, output
    assert site.started() == ["prepare", "train", "train", "compare"]
    assert output.count("already evaluated") == 2


def read_until(process: subprocess.Popen[str], wanted: set[str]) -> list[str]:
    """Reads lines until all those wanted have come."""
    read: list[str] = []
    for line in process.stdout:
        read.append(line.rstrip("\n"))
        if wanted <= set(read):
            return read
    raise AssertionError(read)


def test_training_lines_come_at_once_through_a_pipe(site):
    """The trainers wait until their first line has been read."""
    site.play(
        "train",
        'echo "step 1"; for i in {1..600}; do [ -e "$here/read" ] && break; sleep 0.1; done\n'
        '[ -e "$here/read" ] || exit 1; printf "no newline at the end"',
    )
    process = site.start()
    read_until(process, {"dense: step 1", "lory: step 1"})
    (site.directory / "read").touch()
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, output
    for name in ("dense", "lory"):
        assert f"{name}: no newline at the end\n" in output


def test_ctrl_c_lets_both_trainers_save(site):
    site.play("train", f"exec {sys.executable} '{ROOT / 'tests/support/trainer.py'}'")
    process = site.start()
    read_until(process, {"dense: ready", "lory: ready"})
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert sorted(output.splitlines()) == sorted(
        ["dense: saved", "lory: saved", "stopped; run the same command again to resume"]
    )


def test_a_trainer_that_fails_stops_the_other_and_the_flow(site):
    site.play(
        "train",
        'case "$*" in *experts=0*) echo "error: no such file"; exit 1 ;; esac\n'
        f"exec {sys.executable} '{ROOT / 'tests/support/trainer.py'}'",
    )
    start = time.monotonic()
    status, output = site.run()
    assert status == 1 and time.monotonic() - start < PATIENCE
    assert "dense: error: no such file" in output
    assert output.count("\nerror: ") == 1 and "evaluate" not in site.started()


@pytest.mark.parametrize("argument", ["--steps=", "--steps=many", "--step=3", "stray"])
def test_a_wrong_option_is_one_line(site, argument):
    status, output = site.run(argument)
    assert status == 1
    assert output.startswith("error: --steps" if "--steps=" in argument else f"error: {argument}")
    assert output.count("\n") == 1


def test_help_explains_the_options(site):
    status, output = site.run("--help")
    assert status == 0 and "--steps=N" in output and "default .venv" in output


@pytest.mark.parametrize("version", ["(3, 10)", None])
def test_an_old_or_missing_python_is_one_line(site, tmp_path, version):
    python = tmp_path / "an old python"
    if version:
        python.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.10.0"; exit 1\n')
        python.chmod(0o755)
    result = subprocess.run(
        ["bash", site.directory / "launch" / "local.sh"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHON": str(python)},
    )
    assert result.returncode == 1 and result.stderr.count("\n") == 1
    assert "3.11" in result.stderr and (f"{python}" if not version else "3.10.0") in result.stderr
