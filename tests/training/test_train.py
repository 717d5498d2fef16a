"""The training verb as a user runs it: real processes, real kills, real files."""

import json
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from lory_jax.model.routing_rules import DROPLESS, GATED, SPARSE, TOKEN_CHOICE
from tests.support.tiny import (
    assert_one_line_error,
    verb,
    verb_command,
    verb_environment,
    write_prepared,
    write_recipe,
)

COMPARED = ("loss", "grad_norm", "learning_rate", "experts_active", "router_entropy")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A recipe, prepared data, and one uninterrupted run of Lory."""
    directory = tmp_path_factory.mktemp("train")
    recipe = write_recipe(directory)
    data = write_prepared(directory / "data")
    result = verb(
        "train", f"--config={recipe}", f"--data={data}", f"--workdir={directory / 'whole'}"
    )
    assert result.returncode == 0, result.stderr
    return directory, result.stdout


def arguments(site_directory: Path, workdir: str, *more: str, experts: int = 4) -> list[str]:
    return [
        f"--config={site_directory / 'tiny.py'}:experts={experts}",
        f"--data={site_directory / 'data'}",
        f"--workdir={site_directory / workdir}",
        *more,
    ]


def metrics(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(a: Path, b: Path) -> None:
    """Bit for bit: JSON prints floats exactly."""
    lines_a, lines_b = metrics(a), metrics(b)
    assert [line["step"] for line in lines_b] == list(range(1, 13))
    for line_a, line_b in zip(lines_a, lines_b, strict=True):
        for name in COMPARED:
            assert line_a[name] == line_b[name], (line_a["step"], name)
    assert final_sums(a) == final_sums(b)


def final_sums(workdir: Path) -> dict:
    meta = workdir / "checkpoints" / "12" / "meta" / "metadata"
    return json.loads(meta.read_text())["sums"]


def test_the_two_phases_and_what_is_written(site):
    directory, printed = site
    workdir = directory / "whole"
    assert "step 3: every FFN upcycled to 4 experts" in printed
    lines = metrics(workdir)
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert all(line["experts_active"] is None for line in lines[:3])
    assert all(line["experts_active"] >= 0 for line in lines[3:])
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.5
    assert lines[-1]["tokens"] == 12 * 4 * 24
    assert {line["step"] for line in lines if "validation_loss" in line} == {6, 12}
    assert set(lines[-1]["validation_loss_by_domain"]) == {"ones", "threes"}
    assert json.loads((workdir / "config.json").read_text())["model"]["num_experts"] == 4
    assert list((workdir / "tensorboard").iterdir())
    assert {path.name for path in (workdir / "checkpoints").iterdir()} == {"9", "12"}


def test_finished_run_says_so(site):
    directory, _ = site
    result = verb("train", *arguments(directory, "whole"))
    assert result.returncode == 0
    assert "finished at step 12, nothing to do" in result.stdout


KILLS = [(4, "causal"), (6, "dropless_top2")]  # just upcycled; with what a router has learnt
MORE = [(2, "causal"), (10, "causal")]  # in the dense phase, late
MORE += [(6, routing) for routing in SPARSE if (6, routing) not in KILLS]
KILLS += [pytest.param(*kill, marks=pytest.mark.slow) for kill in MORE]


@pytest.mark.parametrize(("kill_after", "routing"), KILLS)
def test_killed_and_resumed_equals_never_stopped(site, kill_after, routing):
    directory, _ = site
    workdir, whole = directory / f"killed-{kill_after}-{routing}", directory / "whole"
    more = (f"--config.model.routing={routing}",)
    if routing in DROPLESS:
        more += ("--config.model.balancing=loss_free",)
    if routing != "causal":
        whole = directory / routing
        assert verb("train", *arguments(directory, routing, *more)).returncode == 0
    process = subprocess.Popen(
        verb_command("train", *arguments(directory, workdir.name, *more)),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=verb_environment(),
    )
    wait_for_lines(workdir / "metrics.jsonl", kill_after, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    result = verb("train", *arguments(directory, workdir.name, *more))
    assert result.returncode == 0, result.stderr
    assert_same_run(whole, workdir)
    if routing in SPARSE:
        last = metrics(workdir)[-1]
        assert ("dropped_tokens" in last) == (routing not in DROPLESS)
        assert ("load_balancing_loss" in last) == (routing in ("top1", "top2", "remoe"))
        assert ("load_violation" in last) == (routing in (*TOKEN_CHOICE, *GATED))


def test_interrupt_saves_and_resumes(site):
    directory, _ = site
    workdir = directory / "interrupted"
    more = ("--config.checkpoint.every_steps=1000",)
    process = subprocess.Popen(
        verb_command("train", *arguments(directory, workdir.name, *more)),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=verb_environment(),
    )
    wait_for_lines(workdir / "metrics.jsonl", 4, process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    if process.returncode != 0:  # it may just have finished its 12 steps
        assert process.returncode == 130
        assert "is saved at step" in errors
        result = verb("train", *arguments(directory, workdir.name, *more))
        assert result.returncode == 0, result.stderr
        assert "resuming" in result.stdout
    assert_same_run(directory / "whole", workdir)


def wait_for_lines(path: Path, count: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not path.exists() or path.read_text().count("\n") < count:
        assert time.monotonic() < deadline
        if process.poll() is not None:
            return
        time.sleep(0.01)


def test_damaged_newest_checkpoint_is_named_and_the_one_before_used(site):
    directory, _ = site
    workdir = directory / "damaged"
    shutil.copytree(directory / "whole", workdir)
    flip_a_byte(workdir / "checkpoints" / "12")
    result = verb("train", *arguments(directory, workdir.name))
    assert result.returncode == 0, result.stderr
    assert "checkpoints/12 is damaged and skipped" in result.stderr
    assert "resuming" in result.stdout and "at step 9 of 12" in result.stdout
    assert_same_run(directory / "whole", workdir)
    assert "nothing to do" in verb("train", *arguments(directory, workdir.name)).stdout


def test_no_intact_checkpoint_is_refused(site):
    directory, _ = site
    workdir = directory / "all-damaged"
    shutil.copytree(directory / "whole", workdir)
    for checkpoint in (workdir / "checkpoints").iterdir():
        flip_a_byte(checkpoint)
    result = verb("train", *arguments(directory, workdir.name))
    assert_one_line_error(result, 1, "none of the checkpoints [9, 12] is intact")


def flip_a_byte(checkpoint: Path) -> None:
    """Flips one bit in the middle of the largest file of the arrays."""
    files = [path for path in (checkpoint / "state").rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    contents = bytearray(largest.read_bytes())
    contents[len(contents) // 2] ^= 1
    largest.write_bytes(contents)


def test_dense_and_lory_see_the_same_tokens_until_upcycling(site):
    """With uniform routing weights and a router that stays at 0, experts never differ."""
    directory, _ = site
    same = ("--config.model.router_init_scale=0.0", "--config.train.clip_norm=0.0")
    for experts, name in ((4, "copies"), (0, "dense")):
        result = verb("train", *arguments(directory, name, *same, experts=experts))
        assert result.returncode == 0, result.stderr
    lory, dense = metrics(directory / "copies"), metrics(directory / "dense")
    assert [line["loss"] for line in lory[:4]] == pytest.approx(
        [line["loss"] for line in dense[:4]], rel=1e-6
    )
    assert lory[4]["loss"] == pytest.approx(dense[4]["loss"], rel=1e-4)


@pytest.mark.parametrize(
    ("more", "status", "words"),
    [
        (("--config.model.nun_experts=3",), 2, ("model.nun_experts", "model.num_experts")),
        (("--config.model.num_experts=-1",), 2, ("num_experts", "-1", "at least 0")),
        (("--config.model.segment_length=25",), 2, ("segment_length", "25", "24")),
        (("--config.model.num_heads=3",), 2, ("num_heads", "3", "16")),
        (("--config.model.vocab_size=260",), 1, ("vocab_size", "260")),
        (("--config.model.sequence_length=16",), 1, ("sequence_length", "16", "24")),
        (("--config.train.global_batch_size=1000",), 1, ("global_batch_size", "64", "1000")),
        (("--config.parallel.tensor=2",), 1, ("1 devices",)),
        (("--unknown",), 2, ("--unknown",)),
    ],
)
def test_bad_flags_and_sizes(site, more, status, words):
    directory, _ = site
    result = verb("train", *arguments(directory, "never", *more))
    assert_one_line_error(result, status, *words)
    assert not (directory / "never").exists()


def test_workdir_of_another_config_or_other_data_is_refused(site, tmp_path):
    directory, _ = site
    result = verb("train", *arguments(directory, "whole", "--config.train.steps=99"))
    assert_one_line_error(result, 1, "train.steps: found 12, wanted 99")
    other = write_prepared(tmp_path / "other", seed=1)
    result = verb("train", *arguments(directory, "whole"), f"--data={other}")
    assert_one_line_error(result, 1, "data: made from")


def test_missing_and_damaged_data(site, tmp_path):
    directory, _ = site
    missing = verb("train", *arguments(directory, "never"), f"--data={tmp_path / 'none'}")
    assert_one_line_error(missing, 1, "no such directory")
    data = tmp_path / "data"
    shutil.copytree(directory / "data", data)
    shard = next((data / "train").iterdir())
    shard.write_bytes(shard.read_bytes()[:-100])
    truncated = verb("train", *arguments(directory, "never"), f"--data={data}")
    assert_one_line_error(truncated, 1, shard.name, "truncated or damaged")
    shutil.copyfile(directory / "data" / "train" / shard.name, shard)
    tokenizer = data / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + " ")
    mismatch = verb("train", *arguments(directory, "never"), f"--data={data}")
    assert_one_line_error(mismatch, 1, "tokenizer.json", "does not match")
