"""What a run does when things break, part by part; whole processes are in test_faults_*.py."""

import json
import math
import os
import random
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from lory_jax.data.batches import Lookahead, TrainingInstances
from lory_jax.data.prepared import PreparedData
from lory_jax.errors import InputError
from lory_jax.storage import is_inside
from lory_jax.training.monitoring.goodput import Goodput
from lory_jax.training.monitoring.log_files import LogFiles
from lory_jax.training.monitoring.loss_watch import LossWatch
from tests.support.tiny import write_prepared


@contextmanager
def small_disk(directory: Path, size: str):
    """A file system of so many bytes at `directory`, and what mount takes to change it."""
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(directory)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("takes the right to mount a tmpfs")
    try:
        yield directory
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


# ---------------------------------------------------------------- numbers


def test_skips_are_counted_and_spikes_found():
    rng = np.random.default_rng(0)
    losses = (3.0 + 0.05 * rng.standard_normal(200)).tolist()
    watch = LossWatch([])
    assert not any(watch.saw(loss, False) for loss in losses[:100])
    assert watch.saw(4.0, False) == {"loss_spike": True}
    assert watch.saw(math.nan, True) == watch.saw(math.inf, True) == {"skipped": True}
    assert watch.counts() == {"skipped": 2, "in_a_row": 2}
    again = LossWatch([*losses[:100], 4.0, math.nan, math.inf], watch.counts())  # resumed
    for loss in losses[100:]:
        assert watch.saw(loss, False) == again.saw(loss, False)
    assert watch.counts() == again.counts() == {"skipped": 2, "in_a_row": 0}


def test_goodput_adds_up_over_two_processes():
    begin = time.monotonic()
    first = Goodput(since=begin)
    time.sleep(0.02)
    first.begin()
    with first.starting():
        time.sleep(0.02)
    with first.during("save"):
        time.sleep(0.03)
    time.sleep(0.05)
    seconds = first.seconds()
    assert sum(seconds.values()) == pytest.approx(time.monotonic() - begin, abs=0.01)
    assert seconds["start_up"] >= 0.04 and seconds["save"] >= 0.03
    assert seconds["productive"] >= 0.05 and seconds["restart"] == 0
    second = Goodput(since=time.monotonic() - 1.0)
    second.resume(seconds)
    second.repeats(2.0)
    after = second.seconds()
    assert after["restart"] == pytest.approx(3.0, abs=0.1)
    assert {k: after[k] for k in after if k != "restart"} == {
        k: seconds[k] for k in seconds if k != "restart"
    }


# ---------------------------------------------------------------- a disk that is full


def test_metrics_wait_for_a_full_disk_and_lose_no_line(tmp_path, capsys):
    with small_disk(tmp_path / "disk", "256k") as disk:
        files = LogFiles(disk, [], 1)
        files.write({"step": 1, "loss": 1.0})
        (disk / "ballast").write_bytes(bytes(os.statvfs(disk).f_bavail * 4096))
        for step in range(2, 200):
            files.write({"step": step, "loss": 1.0, "text": "x" * 100})
        assert capsys.readouterr().err.count("No space left on device") == 1
        (disk / "ballast").unlink()
        files.write({"step": 200, "loss": 1.0})
        assert "no line of metrics is lost" in capsys.readouterr().err
        assert files.close() == 0
        lines = [json.loads(line) for line in (disk / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 201))


# ---------------------------------------------------------------- damaged data


def flipped(path: Path, offset: int, bit: int) -> bytes:
    """Flips one bit of a file; returns what it held."""
    before = path.read_bytes()
    after = bytearray(before)
    after[offset] ^= 1 << bit
    path.write_bytes(bytes(after))
    return before


def test_a_flipped_bit_in_a_shard_is_named_or_changes_nothing(tmp_path):
    data = write_prepared(tmp_path / "data")
    shard = next((data / "train").iterdir())

    def read_all():
        source = TrainingInstances(PreparedData.open(data).manifest, data)
        return np.stack([source[i] for i in range(len(source))])

    expected, rng, named = read_all(), random.Random(0), 0
    size = shard.stat().st_size
    for _ in range(60):
        before = flipped(shard, rng.randrange(size), rng.randrange(8))
        try:
            assert (read_all() == expected).all()
        except InputError as error:
            assert shard.name in str(error)
            named += 1
        shard.write_bytes(before)
    print(f"{named} of 60 flips named, the others in bytes that hold nothing")
    assert named > 0


def test_damage_is_known_two_batches_ahead():
    def batches(good: int):
        for i in range(good):
            yield np.full(1, i)
        raise InputError("a shard is damaged")

    ahead = Lookahead(batches(4))
    assert [int(ahead.next()[0]) for _ in range(2)] == [0, 1] and ahead.damage is None
    assert int(ahead.next()[0]) == 2 and "damaged" in str(ahead.damage)
    assert int(ahead.next()[0]) == 3  # drawn before
    with pytest.raises(InputError, match="damaged"):
        Lookahead(batches(1))


@pytest.mark.parametrize("name", ["/etc/passwd", "../x", "a/../../x", "a/..", ""])
def test_names_that_lead_out_of_a_directory(name):
    assert not is_inside(name)
    assert is_inside("train/part-00000-of-00001.array_record")
