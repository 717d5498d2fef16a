"""Memory, open files and threads stay where they are over many steps and saves."""

from pathlib import Path

import pytest

from tests.support.faults import Run, last_step
from tests.support.tiny import write_prepared, write_recipe

pytestmark = pytest.mark.faults

STEPS = 2000
SIZE = (
    f"--config.train.steps={STEPS}",
    "--config.train.validate_every_steps=200",
    "--config.checkpoint.every_steps=50",
)
GROWTH_BYTES = 24 * 2**20  # of some 600 MB; allocators breathe


def usage(pid: int) -> tuple[int, int, int]:
    """Resident bytes, open files, threads of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    files, threads = (len(list(Path(f"/proc/{pid}/{kind}").iterdir())) for kind in ("fd", "task"))
    return pages * 4096, files, threads


def test_two_thousand_steps_are_flat(tmp_path):
    write_recipe(tmp_path)
    write_prepared(tmp_path / "data")
    run = Run(tmp_path, "w", *SIZE, experts=0)
    samples = []
    for step in range(200, STEPS, 100):
        if run.until(lambda step=step: last_step(run.workdir) >= step, pause=0.05):
            samples.append((step, *usage(run.process.pid)))
    run.finish()
    for sample in samples:
        print("step {}: {:,} bytes, {} files, {} threads".format(*sample))
    early, late = samples[2:8], samples[-6:]
    for kind, allowed in ((1, GROWTH_BYTES), (2, 2), (3, 2)):
        growth = min(s[kind] for s in late) - max(s[kind] for s in early)
        assert growth <= allowed, samples
