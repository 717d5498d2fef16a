"""Data and work directories in object stores, against emulators that the tests start."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lory_jax.data.prepared import PreparedData
from lory_jax.errors import InputError
from lory_jax.storage import Staging, Uploads, send, storage_path, write_atomically
from tests.support.emulators import object_store
from tests.support.tiny import verb, verb_command, verb_environment, write_prepared, write_recipe

COMPARED = ("loss", "grad_norm", "learning_rate", "experts_active", "router_entropy")


@pytest.fixture(scope="module", params=["s3", "gs"])
def store(request, tmp_path_factory):
    """A bucket that holds prepared data at data/, and a local copy of the same."""
    directory = tmp_path_factory.mktemp(request.param)
    write_recipe(directory)
    data = write_prepared(directory / "data")
    with object_store(request.param, directory / "cache") as bucket:
        for path in sorted(p for p in data.rglob("*") if p.is_file()):
            send(path, storage_path(bucket) / "data" / path.relative_to(data).as_posix())
        yield bucket, directory


def arguments(directory: Path, data: object, workdir: object) -> list[str]:
    return [f"--config={directory / 'tiny.py'}", f"--data={data}", f"--workdir={workdir}"]


def lines(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def compared(workdir: Path) -> list[list]:
    return [[line["step"], *(line[name] for name in COMPARED)] for line in lines(workdir)]


def test_data_are_copied_to_the_cache_and_checked(store):
    bucket, directory = store
    remote = PreparedData.open(f"{bucket}/data")
    local = PreparedData.open(directory / "data")
    assert (remote.manifest, remote.digest) == (local.manifest, local.digest)
    settings = {"sequence_length": 24, "vocab_size": 300, "global_batch_size": 4, "seed": 0}
    here, there = (data.training_batches(**settings) for data in (local, remote))
    for a, b, _ in zip(here.iterate(3), there.iterate(3), range(3), strict=False):
        assert (a == b).all()
    copy = remote.local_files("train/")
    assert directory / "cache" in copy.parents
    assert not (copy / "test").exists()  # only what is asked for
    assert remote.tokenizer.sha256 == local.tokenizer.sha256
    for domain, rows in remote.held_out("test").items():
        assert (rows == local.held_out("test")[domain]).all()


@pytest.mark.parametrize("damage", ["flipped", "missing"])
def test_damaged_and_missing_remote_files_are_named(store, damage, monkeypatch, tmp_path):
    bucket, directory = store
    remote = storage_path(bucket) / f"data-{damage}"
    for name in ("manifest.json", "train/part-00000-of-00001.array_record"):
        send(directory / "data" / name, remote / name)
    shard = remote / "train" / "part-00000-of-00001.array_record"
    if damage == "flipped":
        raw = bytearray(shard.read_bytes())
        raw[100] ^= 1
        shard.write_bytes(bytes(raw))
    else:
        shard.unlink()
    monkeypatch.setenv("LORY_CACHE", str(tmp_path))
    with pytest.raises(InputError, match=f"{shard}: (damaged|missing)"):
        PreparedData.open(remote).local_files("train/")
    assert not list(tmp_path.rglob("*.array_record*"))


def test_not_prepared(store):
    bucket, _ = store
    with pytest.raises(InputError, match=f"{bucket}/nothing: has no manifest.json"):
        PreparedData.open(f"{bucket}/nothing")


@pytest.mark.parametrize("store", ["gs", pytest.param("s3", marks=pytest.mark.slow)], indirect=True)
def test_a_killed_run_in_the_bucket_resumes_as_one_never_stopped(store):
    bucket, directory = store
    whole = directory / "whole"
    result = verb("train", *arguments(directory, directory / "data", whole))
    assert result.returncode == 0, result.stderr

    workdir = storage_path(bucket) / "run"
    command = verb_command("train", *arguments(directory, f"{bucket}/data", workdir))
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=verb_environment()
    )
    output = []
    for line in process.stdout:  # its first checkpoint is uploaded while it goes on
        output.append(line)
        if "step  8/12" in line:
            process.send_signal(signal.SIGKILL)
            break
    process.wait()
    assert process.returncode == -signal.SIGKILL, "".join(output)
    result = verb("train", *arguments(directory, f"{bucket}/data", workdir))
    assert result.returncode == 0, result.stderr
    assert f"resuming {workdir} at step" in result.stdout
    assert compared(workdir) == compared(whole)
    assert json.loads((workdir / "config.json").read_text()) == json.loads(
        (whole / "config.json").read_text()
    )
    assert list((workdir / "tensorboard").iterdir())
    kept = sorted(p.name for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())
    assert kept == ["12", "9"]
    assert sums(workdir) == sums(whole)
    # A local cache that is gone costs time, nothing else.
    shutil.rmtree(directory / "cache")
    again = verb("train", *arguments(directory, f"{bucket}/data", workdir))
    assert "finished at step 12, nothing to do" in again.stdout, again.stderr
    assert not list((directory / "cache" / "checkpoints").glob("*"))  # staging is cleared away


def sums(workdir: Path) -> dict:
    meta = workdir / "checkpoints" / "12" / "meta" / "metadata"
    return json.loads(meta.read_text())["sums"]


def test_uploads_send_what_changed_and_raise_what_failed(store, tmp_path):
    bucket, _ = store
    target = storage_path(bucket) / "uploads"
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a").write_text("one")
    uploads = Uploads(tmp_path, target, every_seconds=0)
    uploads.poll()
    uploads.wait()
    (target / "deep" / "a").write_text("untouched")
    (tmp_path / "b").write_text("two")
    uploads.start()
    uploads.wait()
    assert (target / "deep" / "a").read_text() == "untouched"
    assert (target / "b").read_text() == "two"
    (tmp_path / "b").write_text("three, at last")
    uploads.close()
    assert (target / "b").read_text() == "three, at last"
    broken = Uploads(tmp_path, storage_path(bucket.replace("bucket", "no-such-bucket")))
    with pytest.raises(Exception, match=r".+"):
        broken.close()


def test_staging_of_a_killed_process_is_removed_by_the_next(tmp_path, monkeypatch):
    monkeypatch.setenv("LORY_CACHE", str(tmp_path))
    hold = "from lory_jax.storage import Staging; import time; s = Staging('x'); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", hold])
    deadline = time.monotonic() + 30
    while not (directories := [p for p in tmp_path.glob("x/*") if p.is_dir()]):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    mine = Staging("x")
    assert directories[0].is_dir()  # in use
    process.kill()
    process.wait()
    mine.close()
    Staging("x").close()
    assert not list((tmp_path / "x").iterdir())


def test_schemes():
    assert storage_path("a/b") == Path("a/b")
    assert str(storage_path("gs://a/b") / "c") == "gs://a/b/c"
    with pytest.raises(InputError, match=r"ftp://a/b: got scheme ftp://.*gs://"):
        storage_path("ftp://a/b")


def test_a_local_file_is_written_whole(tmp_path):
    write_atomically(tmp_path / "a", "text")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
