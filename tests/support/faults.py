"""Starting, watching and killing training processes, for the tests of faults."""

import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from tests.support.tiny import ROOT, verb_command, verb_environment

COMPARED = ("loss", "grad_norm", "learning_rate", "experts_active", "router_entropy")
PATIENCE = 600  # seconds, on a busy machine


class Run:
    """`python -m lory_jax.train` as a process whose output goes to files."""

    def __init__(self, directory: Path, workdir: str, *more: str, experts: int = 4, **variables):
        self.workdir = directory / workdir
        command = verb_command(
            "train",
            f"--config={directory / 'tiny.py'}:experts={experts}",
            f"--data={directory / 'data'}",
            f"--workdir={self.workdir}",
            *more,
        )
        # Starts again in seconds: every program is compiled once, however small.
        cache = {
            "JAX_COMPILATION_CACHE_DIR": str(directory / "xla"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        self.output = directory / f"{workdir}-{time.monotonic_ns()}.log"
        with open(self.output, "w") as file:
            self.process = subprocess.Popen(
                command,
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env={**verb_environment(), **cache, **variables},
            )

    def text(self) -> str:
        return self.output.read_text(errors="replace")

    def until(self, is_reached: Callable[[], bool], pause: float = 0.003) -> bool:
        """Waits; False if the process ended before."""
        deadline = time.monotonic() + PATIENCE
        while not is_reached():
            assert time.monotonic() < deadline, self.text()
            if self.process.poll() is not None:
                return is_reached()
            time.sleep(pause)
        return True

    def kill(self, number: int = signal.SIGKILL) -> int:
        self.process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        """The exit status; negative after a signal that was not handled."""
        return self.process.wait(timeout=PATIENCE)

    def finish(self) -> str:
        """Waits for a good end; returns what was printed."""
        status = self.wait()
        assert status == 0, self.text()
        return self.text()


def last_step(workdir: Path) -> int:
    """The step of the last whole line of metrics, 0 if there is none."""
    try:
        with open(workdir / "metrics.jsonl", "rb") as file:
            file.seek(max(0, file.seek(0, 2) - 8192))
            lines = file.read().split(b"\n")[:-1]
        return json.loads(lines[-1])["step"] if lines else 0
    except (FileNotFoundError, ValueError):
        return 0


def lines_of(workdir: Path) -> list[list]:
    """Of every line of metrics what must not depend on how often a run was killed."""
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [[line["step"], *(line[name] for name in COMPARED)] for line in lines]


def sums_of(workdir: Path, step: int) -> dict:
    """The sums over the bits of every leaf of a checkpoint."""
    return json.loads((workdir / "checkpoints" / str(step) / "meta" / "metadata").read_text())[
        "sums"
    ]


def assert_same_run(a: Path, b: Path, steps: int) -> None:
    """Bit for bit: JSON prints floats exactly."""
    assert [line[0] for line in lines_of(b)] == list(range(1, steps + 1))
    assert lines_of(a) == lines_of(b)
    assert sums_of(a, steps) == sums_of(b, steps)


def unfinished(workdir: Path) -> list[Path]:
    """Checkpoints being written, or left half-written."""
    return sorted((workdir / "checkpoints").glob("*.orbax-checkpoint-tmp"))
