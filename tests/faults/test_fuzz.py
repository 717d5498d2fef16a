"""Fuzzing of every reader of outside bytes: only the project's own errors may come out.

The default suite tries each reader for a second or two, with seeded mutations. With the marker
`faults`, atheris (libFuzzer) looks for inputs by coverage, each reader in a process of its own for
LORY_FUZZ_SECONDS (20 by default); `tools/fuzz.py` does the same for longer and writes the figures
of docs/reliability.md.
"""

import os
import random
import subprocess
import sys
import time

import pytest

from tests.support.fuzz_inputs import mutated
from tests.support.fuzz_readers import READERS, read
from tests.support.open_files import reads_only_inside
from tests.support.tiny import ROOT, verb_environment

SHORT_SECONDS = 1.5
LONG_SECONDS = float(os.environ.get("LORY_FUZZ_SECONDS", "20"))


@pytest.mark.parametrize("make", READERS, ids=lambda make: make.__name__)
def test_only_our_own_errors_come_out(make, tmp_path):
    target, rng = make(tmp_path), random.Random(0)
    target.file.write_bytes(target.seed)
    read(target)  # imports what it needs
    end, count = time.monotonic() + SHORT_SECONDS, 0
    while time.monotonic() < end:
        data = mutated(target.seed, rng)
        target.file.write_bytes(data)
        try:
            with reads_only_inside(tmp_path):
                read(target)
        except BaseException as error:
            raise AssertionError(f"{type(error).__name__}: {error}: of {data[:2000]!r}") from error
        count += 1
    assert count > 10


@pytest.mark.faults
@pytest.mark.parametrize("make", READERS, ids=lambda make: make.__name__)
def test_only_our_own_errors_come_out_for_long(make, tmp_path):
    pytest.importorskip("atheris")
    directory = tmp_path / "target"
    directory.mkdir()
    result = subprocess.run(
        [
            *(sys.executable, "-m", "tests.support.fuzz_worker"),
            *(make.__name__, str(LONG_SECONDS), str(directory)),
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=verb_environment(),
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "stat::number_of_executed_units" in result.stderr


def test_a_file_that_is_written_or_lies_outside_is_noticed(tmp_path):
    """What the fuzzing relies on."""
    inside, outside = tmp_path / "in", tmp_path / "out.txt"
    inside.mkdir()
    outside.write_text("a secret")
    (inside / "link").symlink_to(outside)
    (inside / "file").write_text("")
    with reads_only_inside(inside):
        (inside / "file").read_text()
    for act in (
        outside.read_text,
        (inside / "link").read_text,
        (inside / ".." / "out.txt").read_text,
        lambda: (inside / "file").write_text("x"),
        lambda: (inside / "new").mkdir(),
    ):
        with pytest.raises(AssertionError, match=r"open|mkdir"), reads_only_inside(inside):
            act()
