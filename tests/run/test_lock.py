"""The lock of a run directory."""

import json
import os
import signal
import subprocess
import sys

import pytest

from lory_jax.errors import InputError
from lory_jax.run.lock import WorkdirLock, holder
from tests.support.tiny import ROOT

HOLD = "import sys, time, pathlib; from lory_jax.run.lock import WorkdirLock\n"
HOLD += "lock = WorkdirLock(pathlib.Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"


def test_a_lock_ends_with_its_process_even_by_kill(tmp_path):
    assert holder(tmp_path) is None and not list(tmp_path.iterdir())
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, cwd=ROOT
    )
    assert process.stdout is not None and process.stdout.readline() == b"held\n"
    assert f"process {process.pid} on" in (holder(tmp_path) or "")
    with pytest.raises(InputError, match=f"process {process.pid} on"):
        WorkdirLock(tmp_path)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert holder(tmp_path) is None
    lock = WorkdirLock(tmp_path)  # the file was still there
    assert lock is not None
    assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()
