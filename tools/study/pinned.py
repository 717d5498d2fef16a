"""Runs a Python module on one core, and ends it when the process that started this one dies.

    python -m tools.study.pinned CORE MODULE [arguments]

Without the second part, a trainer whose queue was killed would go on and hold its run directory.
"""

import contextlib
import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # Linux: the signal that a process gets when its parent dies


def main(argv: list[str]) -> None:
    core, module, *arguments = argv
    if sys.platform == "linux":
        os.sched_setaffinity(0, {int(core)})
        with contextlib.suppress(AttributeError):  # a C library without prctl
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    os.execv(sys.executable, [sys.executable, "-m", module, *arguments])


if __name__ == "__main__":
    main(sys.argv[1:])
